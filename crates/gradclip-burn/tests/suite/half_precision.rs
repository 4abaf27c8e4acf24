//! Guards against a norm in half precision, or a half that is rounded twice.

use burn::tensor::{DType, Device};
use gradclip_burn::GradClipper;
use gradclip_burn::gradclip::Clip;
use half::{bf16, f16};

use crate::common::{Net, Random, all_numbers, assert_close, devices, gradients, norm};

#[test]
fn halves_are_measured_in_more_and_rounded_once() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        for dtype in [DType::F16, DType::BF16] {
            let round = |x: f64| match dtype {
                DType::F16 => f16::from_f64(x).to_f64(),
                _ => bf16::from_f64(x).to_f64(),
            };
            let mut random = Random(9);
            // Squares of these are not float16 any more.
            let fill = |_: usize, n: usize| random.normals(n).iter().map(|x| round(x * 900.0)).collect::<Vec<_>>();
            let mut grads = gradients(&net, &device, dtype, fill);
            let before = all_numbers(&net, &grads);
            let total = norm(&before.concat());
            let mut clipper = GradClipper::new(Clip::norm(1.0).eps(0.0));
            clipper.clip(&mut grads, &net).expect("finite");
            let report = clipper.report().wait().expect("clipped");
            assert_close(&[report.total_norm], &[total], 1e-6, name);
            for (found, before) in all_numbers(&net, &grads).iter().zip(&before) {
                for (found, x) in found.iter().zip(before) {
                    let (exact, found) = (x / total, *found);
                    // Rounded once, it is one of the two nearest; a coefficient that is off by 1e-6 may choose the other.
                    let near = [exact * (1.0 - 2e-6), exact * (1.0 + 2e-6)].map(round);
                    assert!(near.contains(&found), "{name} {dtype:?}: {x} became {found}, expected one of {near:?}");
                }
            }
        }
    }
}

/// Float16 has nothing below 6e-8.
#[test]
fn what_rounding_loses_is_counted() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let small = |_: usize, n: usize| (0..n).map(|i| if i % 3 == 0 { 6.5e-5 } else { 3.0 }).collect();
        let mut grads = gradients(&net, &device, DType::F16, small);
        let mut clipper = GradClipper::new(Clip::norm(1e9).grad_scale(65536.0)).count_lost();
        clipper.clip(&mut grads, &net).expect("finite");
        let lost = clipper.report().wait().expect("clipped").lost.expect("it is counted");
        let zeros = all_numbers(&net, &grads).concat().iter().filter(|x| **x == 0.0).count();
        assert_eq!((lost.zero, lost.infinite), (zeros as u64, 0), "{name}");
        assert!(zeros > 0, "{name}");
    }
}

/// Models in mixed precision keep float32 beside halves.
#[test]
fn dtypes_may_be_mixed() {
    for (name, device) in devices() {
        let net = Net::new(&device);
        let mut of: Vec<_> =
            [DType::F16, DType::F32].map(|dtype| gradients(&net, &device, dtype, |_, n| vec![0.5; n])).into();
        let (mut floats, mut halves) = (of.pop().expect("two"), of.pop().expect("two"));
        drop(floats.remove::<2>(net.embedding_id()));
        let kept = halves.remove::<2>(net.embedding_id()).expect("there");
        floats.register(net.embedding_id(), kept);
        let count: usize = all_numbers(&net, &floats).iter().map(Vec::len).sum();
        let mut clipper = GradClipper::new(Clip::norm(1.0));
        clipper.clip(&mut floats, &net).expect("finite");
        let total = clipper.report().wait().expect("clipped").total_norm;
        assert_close(&[total], &[(count as f64).sqrt() / 2.0], 1e-6, name);
        assert_eq!(floats.get::<2>(net.embedding_id()).expect("there").dtype(), DType::F16, "{name}");
    }
}

#[test]
fn doubles_are_clipped_where_there_are_any() {
    let device = Device::flex();
    let net = Net::new(&device);
    let mut random = Random(10);
    let mut grads = gradients(&net, &device, DType::F64, |_, n| random.normals(n).iter().map(|x| x * 1e200).collect());
    let before = all_numbers(&net, &grads).concat();
    let scaled: Vec<_> = before.iter().map(|x| x / 1e200).collect();
    let mut clipper = GradClipper::new(Clip::norm(1.0).eps(0.0));
    clipper.clip(&mut grads, &net).expect("finite");
    assert_close(&[clipper.report().wait().expect("clipped").total_norm / 1e200], &[norm(&scaled)], 1e-7, "norm");
    let expected: Vec<_> = scaled.iter().map(|x| x / norm(&scaled)).collect();
    assert_close(&all_numbers(&net, &grads).concat(), &expected, 1e-7, "clipped");
}
