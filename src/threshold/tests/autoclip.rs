use super::*;

#[test]
fn is_the_percentile_of_the_last_norms() {
    for (percentile, history) in [(0.0, 1), (10.0, 7), (37.5, 16), (50.0, 5), (100.0, 12)] {
        let mut threshold = AutoClip::new().percentile(percentile).history(history).warm_up(3);
        let norms: Vec<f64> = noise().map(|norm| (norm * 16.0).round()).take(60).collect();
        for step in 0..norms.len() {
            // The history becomes shorter on the way.
            let history = if step < 40 { history } else { history.div_ceil(2) };
            threshold = threshold.history(history);
            let max_norm = threshold.max_norms(norms[step], &[norms[step]])[0];
            let mut last = norms[(step + 1).saturating_sub(history)..=step].to_vec();
            assert_eq!(threshold.norms, last);
            last.sort_by(f64::total_cmp);
            assert_eq!(threshold.sorted, last);
            let place = percentile * (last.len() - 1) as f64 / 100.0;
            let (low, high) = (last[place.floor() as usize], last[place.ceil() as usize]);
            let expected = if step < 3 { f64::INFINITY } else { low + place.fract() * (high - low) };
            assert!(max_norm == expected || (max_norm - expected).abs() < 1e-13, "{max_norm} {expected}");
        }
    }
}
