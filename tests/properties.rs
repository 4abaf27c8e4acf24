//! Guards against what no one thought of: random sets of tensors, dtypes, offsets and clips, GPU against CPU.
//!
//! `PROPTEST_CASES` sets the number of cases.
#![cfg(feature = "gpu")]

mod common;

use common::gpu::{Layout, clip_laid_out, gpu};
use common::numbers::Random;
use common::{Data, Path, numbers_of};
use gradclip::{Clip, ClipReport, Dtype, Error, NonFinite, NormType, verify_blocking};
use proptest::prelude::*;

fn config() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(150);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::F16), Just(Dtype::BF16)]
}

fn lens() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => 0usize..70,
        3 => 0usize..3000,
        1 => prop_oneof![Just(4095usize), Just(4096), Just(4097), Just(8192), Just(16_383), Just(16_384), Just(16_385), Just(32_769)],
        1 => 0usize..60_000,
    ]
}

/// A tensor: normal numbers of some size, and sometimes something that is not finite.
fn tensors() -> impl Strategy<Value = Data> {
    let bad = prop_oneof![20 => Just(None), 1 => (any::<prop::sample::Index>(), 0..3usize).prop_map(Some)];
    (dtypes(), lens(), -36..36i32, any::<u64>(), bad).prop_map(|(dtype, len, size, seed, bad)| {
        // Float16 holds less.
        let size = if dtype == Dtype::F16 { size / 12 } else { size };
        let mut t = Data::rounded(dtype, Random(seed).normals(len, 10f64.powi(size)));
        if let Some((index, what)) = bad.filter(|_| len > 0) {
            t.set(index.index(len), [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][what]);
        }
        t
    })
}

/// Sets in which sizes are alike or wide apart.
fn sets() -> impl Strategy<Value = Vec<Data>> {
    prop::collection::vec(tensors(), 0..12)
}

/// The threshold relative to the largest gradient, and everything else that a clip has.
#[derive(Clone, Debug)]
struct Asked {
    by_norm: bool,
    norm_type: NormType,
    threshold: f64,
    asymmetry: f64,
    eps: f64,
    grad_scale: f64,
    policy: Option<NonFinite>,
}

fn asked() -> impl Strategy<Value = Asked> {
    let norm_type = prop_oneof![Just(NormType::L1), Just(NormType::L2), Just(NormType::Inf)];
    let threshold = prop_oneof![
        6 => (-6.0..6.0f64).prop_map(|x| 10f64.powf(x)),
        1 => Just(0.0),
        1 => Just(f64::INFINITY),
    ];
    let grad_scale = prop_oneof![
        3 => Just(1.0),
        1 => (-20..20i32).prop_map(|k| 2f64.powi(k)),
        1 => (-3.0..3.0f64).prop_map(|x| 10f64.powf(x)),
    ];
    let policy = prop_oneof![
        Just(None),
        Just(Some(NonFinite::Error)),
        Just(Some(NonFinite::Propagate)),
        Just(Some(NonFinite::Skip)),
        Just(Some(NonFinite::Zero)),
        Just(Some(NonFinite::Drop)),
    ];
    let eps = prop_oneof![Just(0.0), Just(1e-6), Just(0.1)];
    (any::<bool>(), norm_type, threshold, 0.0..2.0f64, eps, grad_scale, policy).prop_map(
        |(by_norm, norm_type, threshold, asymmetry, eps, grad_scale, policy)| Asked {
            by_norm,
            norm_type,
            threshold,
            asymmetry,
            eps,
            grad_scale,
            policy,
        },
    )
}

impl Asked {
    fn clip(&self, set: &[Data]) -> Clip {
        let largest = numbers_of(set).filter(|x| x.is_finite()).fold(1e-30, |max: f64, x| max.max(x.abs()));
        let threshold = self.threshold * largest / self.grad_scale;
        let clip = if self.by_norm {
            Clip::norm(threshold).expect("valid").norm_type(self.norm_type)
        } else {
            Clip::range(-threshold, threshold * self.asymmetry.max(1e-3)).expect("valid")
        };
        let clip = clip.eps(self.eps).expect("valid").grad_scale(self.grad_scale).expect("valid");
        self.policy.map_or(clip, |policy| clip.non_finite(policy))
    }
}

/// Whether a norm is so close to the threshold that its error decides.
fn is_a_tie(report: &ClipReport) -> bool {
    !report.total_norm.is_nan() && (report.clip_coef - 1.0).abs() < 1e-5
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn host_tensors_agree(set in sets(), asked in asked()) {
        let clip = asked.clip(&set);
        let views: Vec<_> = set.iter().map(Data::view).collect();
        let verification = verify_blocking(&clip, &views, gpu()).expect("the device works");
        prop_assert!(verification.agrees(), "{clip:?}: {verification:?}");
        if let (Ok(cpu), Ok(gpu)) = (&verification.cpu, &verification.gpu) {
            let close = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a / b - 1.0).abs() < 1.1e-6;
            prop_assert!(close(cpu.clip_coef, gpu.clip_coef), "{clip:?}: {cpu:?} {gpu:?}");
            prop_assert_eq!(cpu.elements, gpu.elements);
            prop_assert!(cpu.clipped == gpu.clipped || is_a_tie(cpu), "{clip:?}: {cpu:?} {gpu:?}");
        }
    }

    #[test]
    fn plans_at_any_offset_agree(set in sets(), asked in asked(), gaps in prop::collection::vec(0usize..9, 12)) {
        let clip = asked.clip(&set);
        let layout = Layout::with_gaps(&set, |i| gaps[i]);
        let on_gpu = clip_laid_out(gpu(), &clip, &set, &layout);
        let on_host = Path::GpuHost.clip(&clip, &set);
        // Chunks begin elsewhere, so sums may differ in their last bits; decisions and places may not.
        let on_cpu = Path::Cpu.clip(&clip, &set);
        for (other, tolerance) in [(&on_host, 2e-6), (&on_cpu, 1.1e-6)] {
            match (&on_gpu.report, &other.report) {
                (Ok(a), Ok(b)) => {
                    prop_assert_eq!(&a.non_finite, &b.non_finite);
                    prop_assert_eq!(a.elements, b.elements);
                    prop_assert!(a.clipped == b.clipped || is_a_tie(b), "{clip:?}: {a:?} {b:?}");
                    let (a, b) = (a.total_norm, b.total_norm);
                    prop_assert!(a == b || (a.is_nan() && b.is_nan()) || (a / b - 1.0).abs() < tolerance, "{a} {b}");
                }
                (Err(Error::NonFinite(a)), Err(Error::NonFinite(b))) => prop_assert_eq!(a, b),
                (a, b) => prop_assert!(false, "{:?} {:?}", a, b),
            }
            for (a, b) in numbers_of(&on_gpu.after).zip(numbers_of(&other.after)) {
                // A half may be rounded to either side where the coefficients differ in their last bits.
                let close = (a - b).abs() <= 8.1e-3 * a.abs().max(b.abs()) || (a - b).abs() < 1e-7;
                prop_assert!(a == b || (a.is_nan() && b.is_nan()) || close, "{clip:?}: {a:e} {b:e}");
            }
        }
    }
}
