//! Guards against a comparison of GPU and CPU that always agrees.
#![cfg(feature = "gpu")]

use crate::common::Data;
use crate::common::gpu::{block_on, gpu};
use crate::common::numbers::Random;
use gradclip::{Clip, Dtype, NonFinite, Tensor, Verification, verify};

fn verified(clip: &Clip, set: &[Data]) -> Verification {
    let views: Vec<_> = set.iter().map(Data::view).collect();
    verify(clip, &views, gpu()).wait().expect("the device works")
}

fn set() -> Vec<Data> {
    let mut random = Random(61);
    [Dtype::F32, Dtype::F16, Dtype::F32].map(|dtype| Data::rounded(dtype, random.normals(1001, 1.0))).to_vec()
}

#[test]
fn what_agrees_is_said_to() {
    for clip in [Clip::norm(1.0), Clip::norm(1e9), Clip::value(0.5)] {
        let set = set();
        let verification = verified(&clip, &set);
        assert!(verification.agrees(), "{verification:?}");
        assert_eq!((verification.elements, &verification.first_mismatch), (3003, &None));
        assert!(verification.norm_error <= verification.norm_tolerance && verification.norm_tolerance < 1e-5);
        // What was tolerated is told once for each dtype, with a reason.
        let told: Vec<_> = verification.tolerated.iter().map(|t| (t.dtype, t.ulps)).collect();
        assert_eq!(told.iter().map(|(dtype, _)| *dtype).collect::<Vec<_>>(), [Dtype::F32, Dtype::F16]);
        assert!(verification.tolerated.iter().all(|t| !t.why.is_empty()));
        assert!(told.iter().all(|(_, ulps)| verification.worst_ulps <= *ulps || *ulps < told[0].1), "{verification:?}");
        let (Ok(cpu), Ok(gpu)) = (&verification.cpu, &verification.gpu) else { panic!("{verification:?}") };
        assert_eq!((cpu.elements, cpu.clipped), (gpu.elements, gpu.clipped));
    }
}

#[test]
fn each_kind_of_difference_counts() {
    let clip = Clip::norm(1.0);
    let same = verified(&clip, &set());
    assert!(same.agrees());
    let off = |change: &dyn Fn(&mut Verification)| {
        let mut changed = same.clone();
        change(&mut changed);
        assert!(!changed.agrees(), "{changed:?}");
    };
    off(&|v| v.norm_error = v.norm_tolerance * 1.01);
    off(&|v| v.norm_error = f64::INFINITY);
    off(&|v| v.norm_error = f64::NAN);

    // One of them found something that the other did not, or elsewhere.
    let bad_at = |index: usize| {
        let mut set = set();
        set[1].set(index, f64::NAN);
        verified(&clip, &set)
    };
    let (one, other) = (bad_at(3), bad_at(4));
    assert!(one.agrees() && other.agrees());
    assert!(one.cpu.is_err() && one.gpu.is_err());
    off(&|v| v.gpu = one.gpu.clone());
    off(&|v| v.cpu = one.cpu.clone());
    off(&|v| (v.cpu, v.gpu) = (one.cpu.clone(), other.gpu.clone()));
}

/// Both decide the same about a NaN, whatever the policy.
#[test]
fn refusals_are_compared_too() {
    let mut set = set();
    set[2].set(1000, f64::INFINITY);
    for policy in [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop] {
        for clip in [Clip::norm(1.0), Clip::value(0.5)] {
            let verification = verified(&clip.non_finite(policy), &set);
            assert!(verification.agrees(), "{policy:?}: {verification:?}");
            assert_eq!(verification.cpu.is_err(), policy == NonFinite::Error);
        }
    }
}

#[test]
fn nothing_is_compared_with_nothing() {
    let verification = verified(&Clip::norm(1.0), &[]);
    assert!(verification.agrees());
    assert_eq!((verification.elements, verification.norm_error, verification.worst_ulps), (0, 0.0, 0));
}

#[test]
fn verifying_leaves_the_tensors_alone_and_can_be_awaited() {
    let values = [3.0f32, 4.0];
    let clip = Clip::norm(1.0);
    let verification = block_on(verify(&clip, &[Tensor::new(&values).named("w")], gpu())).expect("the device works");
    assert!(verification.agrees());
    assert_eq!(values, [3.0, 4.0]);
}
