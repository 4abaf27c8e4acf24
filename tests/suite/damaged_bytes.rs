//! Guards against a running partial that changes on its way to another process, and against bytes that are taken for
//! one.

use crate::common::numbers::Random;
use crate::common::{Data, POLICIES, assert_says};
use gradclip::{Clip, Clipper, Dtype, Error, NonFinite, NormAccumulator, NormType};

/// The running partial of these tensors.
fn running(clip: &Clip, set: &[Data]) -> NormAccumulator {
    let mut running = NormAccumulator::new(clip).expect("a global norm");
    Clipper::cpu().accumulate(&mut running, &set.iter().map(Data::view).collect::<Vec<_>>()).expect("open");
    running
}

fn sent(of: &NormAccumulator, clip: &Clip) -> NormAccumulator {
    NormAccumulator::from_bytes(clip, &of.to_bytes().expect("open")).expect("just written")
}

fn hash(bytes: &[u8]) -> [u8; 8] {
    let one = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, one).to_le_bytes()
}

#[test]
fn sent_partials_merge_to_the_same_bits() {
    let mut random = Random(1);
    let norms = [NormType::L2, NormType::L1, NormType::Inf, NormType::p(3.0), NormType::p(0.3)];
    let by_norm = norms.map(|norm_type| Clip::norm(0.5).norm_type(norm_type));
    for clip in by_norm.into_iter().chain([Clip::rms(1e-3), Clip::average_norm(1e-6).grad_scale(0.3)]) {
        for (policy, bad) in POLICIES.into_iter().flat_map(|policy| [(policy, None), (policy, Some(f64::NAN))]) {
            let clip = clip.non_finite(policy);
            // Of sizes whose powers need an exponent, too.
            let mut set = [1.0, 1e300, 1e-300]
                .map(|size| vec![Data::rounded(Dtype::F64, random.normals(50, size)).named("w"), Data::of::<f32>(&[])]);
            if let Some(bad) = bad {
                set[1][0].set(7, bad);
            }
            let (mut all, mut of_sent) = (NormAccumulator::new(&clip).expect("fits"), None::<NormAccumulator>);
            for part in &set {
                let part = running(&clip, part);
                assert_eq!(sent(&part, &clip), part);
                all.merge(&part).expect("the same clip");
                let mut sent_so_far = of_sent.unwrap_or_else(|| NormAccumulator::new(&clip).expect("fits"));
                sent_so_far.merge(&sent(&part, &clip)).expect("the same clip");
                of_sent = Some(sent(&sent_so_far, &clip));
            }
            let of_sent = of_sent.expect("three parts");
            assert_eq!(of_sent, all, "{clip}");
            // As text, because some norms are NaN.
            assert_eq!(format!("{:?}", of_sent.report()), format!("{:?}", all.report()), "{clip}");
        }
    }
}

/// Another version of the library must read what this one writes.
#[test]
fn the_format_is_as_documented() {
    let clip = Clip::norm(1.0).norm_type(NormType::Inf).non_finite(NonFinite::Skip);
    let set = [Data::of(&[2.0f32, f32::NAN]).named("w")];
    let text = b"norm 1 (inf), non-finite: skip";
    let numbers = [1, 2, 0, 0, 2f64.to_bits(), 1, 1, 0, 1, text.len() as u64].map(u64::to_le_bytes);
    let mut want = [b"gradnrm\x01", numbers.as_flattened(), text, &1u64.to_le_bytes(), b"w"].concat();
    want.extend(hash(&want));
    assert_eq!(running(&clip, &set).to_bytes().expect("open"), want);
}

#[test]
fn bad_bytes_are_an_error() {
    let clip = Clip::norm(1.0);
    let of = running(&clip.non_finite(NonFinite::Drop), &[Data::of(&[3.0f32, f32::NAN]).named("layer")]);
    let bytes = of.to_bytes().expect("open");
    let read = |bytes: &[u8]| NormAccumulator::from_bytes(&clip.non_finite(NonFinite::Drop), bytes);
    assert_eq!(read(&bytes).expect("whole"), of);
    let refused = |bytes: &[u8], words: &str| {
        let error = read(bytes).expect_err(words);
        assert!(matches!(error, Error::Usage(_)), "{error}");
        assert_says(&error, &[words]);
    };
    for i in 0..bytes.len() {
        refused(&bytes[..i], if i < 8 { "damaged" } else { "" });
        for flip in [1, 0x80, 0xff] {
            let mut other = bytes.clone();
            other[i] ^= flip;
            refused(&other, if i < 8 { "another version" } else { "" });
        }
    }
    refused(&[&bytes[..], b"x"].concat(), "damaged");
    let error = NormAccumulator::from_bytes(&clip, &bytes).expect_err("another policy");
    assert_says(&error, &["of another clip: norm 1 (L2), non-finite: drop, where this is norm 1 (L2)"]);
    let error = NormAccumulator::from_bytes(&Clip::value(1.0), &bytes).expect_err("no norm");
    assert_says(&error, &["a running partial needs a clip by norm"]);
}

/// Whatever the numbers are, with the right hash: an error, or a partial that merges and reports.
#[test]
fn any_numbers_are_an_error_or_a_partial() {
    let mut random = Random(2);
    let mut accepted = 0;
    for norm_type in [NormType::L2, NormType::Inf, NormType::p(3.0)] {
        let clip = Clip::norm(1.0).norm_type(norm_type).non_finite(NonFinite::Skip);
        let bytes = running(&clip, &[Data::of(&[3.0f32, f32::NAN])]).to_bytes().expect("open");
        let some = [0, 1, 2, u64::MAX, 1 << 60, 1 << 63, 2f64.to_bits(), f64::MAX.to_bits(), f64::NAN.to_bits()];
        for _ in 0..5000 {
            let mut other = bytes.clone();
            for _ in 0..=random.below(3) {
                let at = 8 + 8 * random.below(9);
                other[at..at + 8].copy_from_slice(&some[random.below(some.len())].to_le_bytes());
            }
            let end = other.len() - 8;
            let hash = hash(&other[..end]);
            other[end..].copy_from_slice(&hash);
            let Ok(mut read) = NormAccumulator::from_bytes(&clip, &other) else { continue };
            accepted += 1;
            assert_eq!(read.to_bytes().expect("open"), other);
            let copy = read.clone();
            read.merge(&copy).expect("the same clip");
            let report = read.report().expect("skipped");
            assert!(report.total_norm.is_nan() || report.total_norm >= 0.0, "{report:?}");
        }
    }
    assert!(accepted > 500, "{accepted}");
}
