//! Spikes: norms that stand out from those of the steps before.
//!
//! The z-score of a norm N is (ln N - median) / spread, over ln N of the steps before it: at most [`WINDOW`] of them, those that
//! are finite and above 0. The spread is 1.4826 times the median distance from the median, which for normally distributed
//! numbers is their standard deviation. One spike among the steps before changes neither, unlike mean and variance.

/// How many steps a norm is compared with.
const WINDOW: usize = 50;

/// A norm with fewer steps before it has no z-score.
const FEWEST: usize = 5;

/// The least spread, so that norms that hardly change have no spikes of some per cent.
const LEAST_SPREAD: f64 = 0.05;

/// The z-score of each norm that has one.
pub(super) fn z_scores(norms: &[f64]) -> Vec<Option<f64>> {
    let mut before: Vec<f64> = Vec::new();
    let score = |norm: &f64| {
        let log = norm.ln();
        if !log.is_finite() {
            return None;
        }
        let recent = &before[before.len().saturating_sub(WINDOW)..];
        let z = (recent.len() >= FEWEST).then(|| {
            let middle = median(recent.to_vec());
            let distances = recent.iter().map(|log| (log - middle).abs()).collect();
            (log - middle) / (1.4826 * median(distances)).max(LEAST_SPREAD)
        });
        before.push(log);
        z
    };
    norms.iter().map(score).collect()
}

/// The median; NaN of nothing.
pub(super) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    let half = numbers.len() / 2;
    match numbers.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => numbers[half],
        _ => 0.5 * (numbers[half - 1] + numbers[half]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_stands_out_and_hides_no_other() {
        let mut norms: Vec<_> = (0..40).map(|i| 1.0 + 0.1 * f64::from(i % 7)).collect();
        (norms[20], norms[21], norms[30]) = (30.0, 30.0, f64::NAN);
        let scores = z_scores(&norms);
        let spikes: Vec<_> = (0..40).filter(|i| scores[*i].is_some_and(|z| z > 6.0)).collect();
        assert_eq!(spikes, [20, 21]);
        assert!(scores[..5].iter().all(Option::is_none) && scores[5..30].iter().all(Option::is_some));
        assert_eq!(scores[30], None);
    }

    #[test]
    fn neither_a_trend_nor_constant_norms_are_spikes() {
        let falling: Vec<_> = (0..200).map(|i| (-0.02 * f64::from(i)).exp()).collect();
        let mut constant = vec![1.0; 50];
        constant[40] = 1.2;
        for norms in [falling, constant] {
            assert!(z_scores(&norms).into_iter().flatten().all(|z| z < 6.0));
        }
        // 0.5 / 0.05
        assert!((z_scores(&[1.0, 1.0, 1.0, 1.0, 1.0, 0.5f64.exp()])[5].unwrap() - 10.0).abs() < 1e-9);
    }
}
