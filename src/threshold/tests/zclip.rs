use super::*;

#[test]
fn follows_the_formula() {
    let mut threshold = warm_zclip();
    assert_eq!((threshold.mean, threshold.variance), (2.0, 1.0));
    assert_eq!(threshold.max_norm(3.0), f64::INFINITY);
    assert_eq!((threshold.mean, threshold.variance, threshold.steps), (2.5, 0.625, 3));
    // z = 2 is not above 2.
    assert_eq!(warm_zclip().max_norm(4.0), f64::INFINITY);
}

#[test]
fn takes_a_spike_in_as_it_was_clipped() {
    let (mut spiked, mut calm) = (warm_zclip(), warm_zclip());
    // z = 4, so it is clipped to 2 + 2² / 4.
    assert_eq!(spiked.max_norms(6.0, &[6.0]), [3.0]);
    calm.max_norm(3.0);
    assert_eq!(spiked, calm);
    let before = spiked.clone();
    let max_norm = spiked.max_norm(1e300);
    assert!((max_norm - before.mean).abs() < 1e-290 && spiked.variance < before.variance);
}

#[test]
fn warms_up_with_the_plain_mean_and_variance() {
    let mut threshold = ZClip::new();
    let norms: Vec<f64> = noise().take(25).collect();
    assert!(norms.iter().all(|&norm| threshold.max_norm(norm) == f64::INFINITY));
    let mean = norms.iter().sum::<f64>() / 25.0;
    let variance = norms.iter().map(|norm| (norm - mean).powi(2)).sum::<f64>() / 25.0;
    assert!((threshold.mean - mean).abs() < 1e-15 && (threshold.variance - variance).abs() < 1e-15);
    assert!(threshold.max_norm(100.0) < mean + 2.5 * variance.sqrt());
}

#[test]
fn follows_norms_that_drift() {
    let mut threshold = ZClip::new();
    let clipped = noise()
        .take(2000)
        .enumerate()
        .map(|(step, noise)| noise * (1.0 + step as f64 / 500.0))
        .filter(|&norm| threshold.max_norm(norm) < norm)
        .count();
    assert!(clipped < 20, "{clipped}");
    assert!((threshold.mean - 5.0).abs() < 0.5, "{}", threshold.mean);
}

#[test]
fn leaves_the_constant_behind() {
    let mut threshold = zclip(2);
    for _ in 0..10 {
        threshold.max_norm(0.0);
    }
    assert_eq!(threshold.max_norm(8.0), f64::INFINITY);
    assert_eq!((threshold.mean, threshold.variance), (4.0, 8.0));
}

#[test]
fn skips_by_the_z_of_the_norm() {
    let skipping = |z| warm_zclip().skip_above_z(z);
    assert_eq!((skipping(3.0).skip_above(), skipping(f64::INFINITY).skip_above()), (5.0, f64::INFINITY));
    // Not in the warm-up, nor without a spread.
    assert_eq!(zclip(2).skip_above_z(3.0).skip_above(), f64::INFINITY);
    let mut constant = zclip(2).skip_above_z(3.0);
    (0..5).for_each(|_| assert_eq!(constant.max_norm(1.0), f64::INFINITY));
    assert_eq!(constant.skip_above(), f64::INFINITY);
}
