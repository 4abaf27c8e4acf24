//! Guards against clips, shapes, parameters and states that do not fit together but are accepted: each must give one
//! error that names the tensor and the reason, and nothing may be written.

use crate::common::{Data, Path, UNWRITTEN, assert_same_bits, assert_says, parameters, views, views_mut};
use gradclip::{
    AdaGc, AutoClip, Budget, Clip, Clipper, Dtype, Error, Mode, NonFinite, NormAccumulator, NormType, Scope, Tensor,
    TensorMut, Threshold, UnitAxis, ZClip,
};

fn norm() -> Clip {
    Clip::norm(1.0)
}

fn agc() -> Clip {
    Clip::agc(0.01)
}

/// Large enough to be clipped by everything that takes it.
fn tensor(name: &str, shape: &[usize]) -> Data {
    Data::rounded(Dtype::F32, vec![3.0; shape.iter().product()]).named(name).shaped(shape)
}

/// Checks that every path refuses a clip with these words and writes nothing.
#[track_caller]
fn refused(clip: &Clip, set: &[Data], words: &[&str]) {
    for path in Path::ALL {
        let done = path.clip(clip, set);
        assert_says(&done.report.expect_err("it should be refused"), words);
        assert_same_bits(&done.after, set, "refused");
    }
    for path in Path::HOST {
        let parameters = parameters(set);
        assert_says(&path.clipper().measure(clip, &views(set, &parameters)).expect_err("refused"), words);
    }
}

#[test]
fn settings_that_cannot_be() {
    let set = [tensor("w", &[2, 3]).with_parameter(tensor("w", &[2, 3]))];
    let refused = |clip: Clip, words: &[&str]| refused(&clip, &set, words);
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    let negative = [(-1.0, "-1;"), (-f64::MIN_POSITIVE, "-2.2250738585072014e-308;"), (-inf, "-inf;"), (nan, "NaN;")];
    for (bad, told) in negative {
        refused(Clip::norm(bad), &["max_norm is", told, "0 or more"]);
        refused(Clip::rms(bad), &["max_rms is", told, "0 or more"]);
        refused(Clip::average_norm(bad), &["max_average_norm is", told, "0 or more"]);
        refused(Clip::value(bad), &["clip_value is", told, "0 or more"]);
        refused(norm().norm_type(NormType::p(bad)), &["norm_type is", told, "above 0"]);
        refused(norm().grad_scale(bad), &["grad_scale is", told, "above 0"]);
    }
    for (bad, told) in negative.into_iter().chain([(inf, "inf;")]) {
        refused(Clip::agc(bad), &["clip_factor is", told, "finite"]);
        refused(norm().eps(bad), &["eps is", told, "finite"]);
        refused(agc().agc_eps(bad), &["agc_eps is", told, "finite"]);
    }
    for (bad, told) in [(0.0, "0;"), (-0.0, "-0;")] {
        refused(norm().norm_type(NormType::p(bad)), &["norm_type is", told, "above 0"]);
        refused(norm().grad_scale(bad), &["grad_scale is", told, "above 0"]);
    }
    refused(norm().grad_scale(1e-310), &["grad_scale is 1e-310;", "above 0"]);
    refused(norm().grad_scale(inf), &["grad_scale is inf;", "above 0"]);
    for (min, max) in [(1.0, 0.0), (1.0, 0.999), (inf, 1.0), (nan, 1.0), (1.0, nan)] {
        refused(Clip::range(min, max), &["the clip range is", &format!("{min} to {max};"), "min <= max"]);
    }
}

#[test]
fn settings_that_nothing_uses() {
    let set = [tensor("w", &[2, 3]).with_parameter(tensor("w", &[2, 3]))];
    let refused = |clip: Clip, words: &[&str]| refused(&clip, &set, words);
    let others = [Clip::rms(1.0), Clip::average_norm(1.0), Clip::value(1.0)];
    for clip in others {
        refused(clip.norm_type(NormType::L1), &["norm_type is L1;", "Clip::norm and Clip::agc"]);
    }
    for clip in others.into_iter().chain([agc()]) {
        refused(clip.eps(1e-6), &["eps is 1e-6;", "Clip::norm"]);
    }
    for clip in [norm(), Clip::rms(1.0), Clip::average_norm(1.0), Clip::value(1.0)] {
        refused(clip.agc_eps(0.0), &["agc_eps is 0;", "Clip::agc"]);
    }
    for scope in [Scope::Global, Scope::Tensor, Scope::Example, Scope::ExampleTensor] {
        refused(norm().scope(scope).unit_axis(UnitAxis::First), &["unit_axis is first;", "Scope::Unit"]);
    }
    for scope in [Scope::Global, Scope::Tensor, Scope::Unit, Scope::Example] {
        refused(norm().scope(scope).budget(Budget::Sized), &["budget is sized;", "Scope::ExampleTensor"]);
    }
    let by_example = agc().scope(Scope::ExampleTensor);
    refused(by_example.budget(Budget::Uniform), &["budget is uniform;", "Clip::agc does not"]);
    refused(Clip::value(1.0).scope(Scope::Tensor), &["scope is tensor;", "a value clip"]);
    for clip in [norm(), Clip::rms(1.0), agc()] {
        refused(clip.report_norm(true), &["report_norm is true;", "only a value clip"]);
    }
    // What comes to the same is no mistake.
    let same = Clip::value(1.0).norm_type(NormType::P(2.0)).scope(Scope::Global).budget(Budget::Each);
    assert!(Clipper::cpu().measure(&same, &views(&set, &parameters(&set))).expect("as it is").clipped);
}

#[test]
fn descriptions_are_told_on_one_line() {
    let scoped = norm().scope(Scope::Unit).unit_axis(UnitAxis::Last).eps(0.0);
    let shared = norm().scope(Scope::ExampleTensor).budget(Budget::Sized).norm_type(NormType::Inf);
    for (clip, told) in [
        (norm(), "norm 1 (L2)"),
        (
            norm().scope(Scope::Tensor).grad_scale(65536.0).non_finite(NonFinite::Skip),
            "norm 1 (L2), per tensor, grad_scale 65536, non-finite: skip",
        ),
        (scoped, "norm 1 (L2), per unit, unit_axis last, eps 0"),
        (agc().unit_axis(UnitAxis::Optax), "AGC 0.01, per unit, unit_axis optax"),
        (agc().unit_axis(UnitAxis::axes(&[-1, 2, 0, 2])), "AGC 0.01, per unit, unit_axis 0,2,-1"),
        (agc().unit_axis(UnitAxis::over(&[1])), "AGC 0.01, per unit, unit_axis over:1"),
        (shared, "norm 1 (inf), per example-tensor, budget sized"),
        (norm().norm_type(NormType::P(1.5)).eps(1e-6), "norm 1 (L1.5)"),
        (Clip::rms(1e-9), "RMS 1e-9"),
        (Clip::average_norm(f64::INFINITY), "average norm inf"),
        (agc().agc_eps(0.5), "AGC 0.01, per unit, agc_eps 0.5"),
        (agc().norm_type(NormType::Inf), "AGC 0.01 (inf), per unit"),
        (Clip::range(-1e300, 0.25).non_finite(NonFinite::Error), "value -1e300 to 0.25, non-finite: error"),
        (Clip::value(0.5), "value -0.5 to 0.5"),
        (Clip::value(0.5).report_norm(true), "value -0.5 to 0.5, report_norm"),
    ] {
        assert_eq!(clip.to_string(), told);
    }
    assert_eq!(format!("{:.2}", Clip::norm(0.123_456).grad_scale(1234.5)), "norm 0.123 (L2), grad_scale 1234.5");
    assert_eq!(scoped.mode, Mode::Norm(1.0));
}

#[test]
fn adaptive_clips_without_the_parameter() {
    let w = || tensor("w", &[2, 3]).with_parameter(tensor("w", &[2, 3]));
    refused(&agc(), &[w(), tensor("b", &[3])], &["tensor \"b\"", "needs its parameter", "parameter(..)"]);
    for (gradient, parameter) in
        [(&[2, 3][..], &[3, 2][..]), (&[6], &[2, 3]), (&[2, 3], &[6]), (&[], &[1]), (&[2, 3], &[2])]
    {
        let bad = tensor("b", gradient).with_parameter(tensor("b", parameter));
        let shapes = [format!("{gradient:?}"), format!("{parameter:?}")];
        refused(
            &agc(),
            &[w(), bad],
            &["tensor \"b\"", "its shape is", "that of its parameter", &shapes[0], &shapes[1]],
        );
    }
    let bad = tensor("b", &[3]).with_parameter(tensor("other", &[3]));
    refused(&agc(), &[w(), bad], &["tensor \"b\"", "parameter of \"other\""]);
    // Without a name it goes by its place.
    let nameless = Data::rounded(Dtype::F32, [1.0]);
    refused(&agc(), &[w(), nameless], &["tensor 1:"]);
    // A shape that was not told is one dimension, and a name that was not given is no other.
    let bare = Data::rounded(Dtype::F16, [3.0; 3]).with_parameter(tensor("of the parameter", &[3]));
    let told = tensor("b", &[3]).with_parameter(Data::rounded(Dtype::BF16, [3.0; 3]));
    for path in Path::ALL {
        assert!(path.clip(&agc(), &[bare.clone(), told.clone()]).ok().0.clipped);
    }
}

#[test]
fn examples_that_disagree() {
    for scope in [Scope::Example, Scope::ExampleTensor] {
        let set = [tensor("w", &[4, 3]), tensor("e", &[4, 0]), tensor("b", &[5, 2])];
        refused(&norm().scope(scope), &set, &["tensor \"b\"", "tensor \"w\"", "5 examples", " 4"]);
        let set = [tensor("w", &[4, 3]), Data::rounded(Dtype::F32, [1.0; 12]).named("flat")];
        refused(&norm().scope(scope), &set, &["tensor \"flat\"", "tensor \"w\"", "12 examples", " 4"]);
        for set in [[tensor("w", &[1, 3]), tensor("s", &[])], [tensor("s", &[]), tensor("w", &[1, 3])]] {
            refused(&norm().scope(scope), &set, &["tensor \"s\"", "scalar", "dimension 0"]);
        }
    }
}

#[test]
fn axes_that_a_tensor_does_not_have() {
    let set = [tensor("w", &[2, 3]), tensor("b", &[2])];
    let per_unit = norm().scope(Scope::Unit);
    for (axis, told) in [(1, "no axis 1"), (-2, "no axis -2"), (isize::MAX, "no axis 31"), (isize::MIN, "no axis -32")]
    {
        let name = if axis.unsigned_abs() < 9 { "\"b\"" } else { "\"w\"" };
        for axes in [UnitAxis::axes(&[0, axis]), UnitAxis::over(&[axis])] {
            refused(&per_unit.unit_axis(axes), &set, &["tensor", name, "its shape is", told]);
        }
    }
    let set = [tensor("b", &[3]), tensor("w", &[2, 1, 1, 1, 1, 2])];
    refused(&per_unit.unit_axis(UnitAxis::Optax), &set, &["tensor \"w\"", "[2, 1, 1, 1, 1, 2]", "up to 5 dimensions"]);
}

/// It has no axis that it could lack.
#[test]
fn a_scalar_is_one_unit() {
    let set = [tensor("s", &[]).with_parameter(tensor("s", &[]))];
    let axes = [UnitAxis::First, UnitAxis::Last, UnitAxis::Optax, UnitAxis::axes(&[5]), UnitAxis::over(&[-2])];
    for path in Path::ALL {
        for clip in [norm().scope(Scope::Unit), agc()] {
            for clip in axes.map(|axis| clip.unit_axis(axis)).into_iter().chain([clip]) {
                let report = path.clip(&clip, &set).ok().0;
                assert!(report.clipped && report.segments.len() == 1 && report.segments[0].index.is_none(), "{clip}");
            }
        }
    }
}

/// A tensor without elements may still have examples: more than can be counted are refused before any is made.
#[test]
fn more_segments_than_can_be_counted() {
    let set = [tensor("e", &[1 << 32, 0])];
    refused(&norm().scope(Scope::Example), &set, &["segments", "4294967296"]);
}

#[test]
fn shapes_with_another_number_of_elements() {
    let mut data = [1.0f32; 6];
    for shape in [&[][..], &[5], &[7], &[2, 4], &[6, 0], &[6, 2], &[usize::MAX, 2], &[1 << 32, 1 << 32, 6]] {
        for error in [
            Tensor::new(&data).named("w").shape(shape).expect_err("another number"),
            TensorMut::new(&mut data).named("w").shape(shape).expect_err("another number"),
        ] {
            assert!(matches!(error, Error::Tensor { .. }));
            assert_says(&error, &["tensor \"w\"", &format!("{shape:?}"), "6 elements"]);
        }
    }
    assert_says(&Tensor::new(&data).shape(&[5]).expect_err("another number"), &["the tensor", "[5]"]);
    for shape in [&[6][..], &[2, 3], &[1, 6, 1], &[3, 2, 1]] {
        Tensor::new(&data).shape(shape).expect("it fits");
    }
    let none: [f32; 0] = [];
    for shape in [&[0][..], &[4, 0], &[usize::MAX, usize::MAX, 0]] {
        Tensor::new(&none).shape(shape).expect("no elements either way");
    }
    assert!(Tensor::new(&none).shape(&[]).is_err(), "a scalar is one element");
}

#[test]
fn sums_of_what_is_no_examples() {
    let set = [tensor("w", &[4, 2, 3]), tensor("b", &[4, 3]).named("b")];
    let per_example = norm().scope(Scope::Example);
    let sums =
        |lens: &[usize]| -> Vec<_> { lens.iter().map(|n| Data::rounded(Dtype::F32, vec![UNWRITTEN; *n])).collect() };
    for path in Path::HOST {
        let refused = |clip: &Clip, set: &[Data], mut sums: Vec<Data>, words: &[&str]| {
            let before = sums.clone();
            let (none, mut views_mut) = (parameters(set), sums.iter_mut().map(Data::view_mut).collect::<Vec<_>>());
            let error = path.clipper().sum_examples(clip, &views(set, &none), &mut views_mut).expect_err("refused");
            assert_says(&error, words);
            assert_same_bits(&sums, &before, "refused");
        };
        for clip in [norm(), norm().scope(Scope::Tensor), norm().scope(Scope::Unit), Clip::value(1.0)] {
            refused(&clip, &set, sums(&[6, 3]), &["Example", "ExampleTensor"]);
        }
        for scope in [Scope::Example, Scope::ExampleTensor] {
            let clip = norm().scope(scope);
            refused(&clip, &set, sums(&[6]), &["sums of examples", "1 given", "2 needed"]);
            refused(&clip, &set, sums(&[6, 3, 3]), &["sums of examples", "3 given", "2 needed"]);
            refused(&clip, &set, sums(&[6, 12]), &["tensor \"b\"", "3 elements", "12"]);
            refused(&clip, &set, sums(&[3, 6]), &["tensor \"w\"", "6 elements", "its sum 3"]);
        }
        for (dtype, right, wrong) in [
            (Dtype::F32, "float32", Dtype::F64),
            (Dtype::BF16, "float32", Dtype::BF16),
            (Dtype::F64, "float64", Dtype::F32),
        ] {
            let set = [Data::rounded(dtype, [1.0; 6]).named("w").shaped(&[2, 3])];
            let sums = vec![Data::rounded(wrong, [UNWRITTEN; 3])];
            refused(&per_example, &set, sums, &["tensor \"w\"", right, &wrong.to_string()]);
        }
        let scalar = [tensor("s", &[])];
        refused(&per_example, &scalar, sums(&[1]), &["tensor \"s\""]);
        let uneven = [tensor("w", &[4, 3]), tensor("b", &[2, 3])];
        refused(&per_example, &uneven, sums(&[3, 3]), &["tensor \"b\"", "examples"]);
    }
}

#[test]
fn given_norms_that_are_none() {
    let set = [tensor("w", &[2, 3]), tensor("b", &[3])].map(|t| t.clone().with_parameter(t));
    let refused = |clip: &Clip, norms: &[f64], words: &[&str]| {
        let mut after = set.to_vec();
        let error = Clipper::cpu().scale(clip, norms, &mut views_mut(&mut after, &parameters(&set)));
        assert_says(&error.expect_err("refused"), words);
        assert_same_bits(&after, &set, "refused");
    };
    for (scope, needed) in [(Scope::Global, 1), (Scope::Tensor, 2), (Scope::Unit, 3)] {
        for given in (0..5).filter(|given| *given != needed) {
            let words = [format!("{given} given"), format!("{needed} needed")];
            refused(&norm().scope(scope), &vec![9.0; given], &["norms by segment", &words[0], &words[1]]);
        }
    }
    let policies = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
    for policy in policies {
        let clip = norm().scope(Scope::Tensor).non_finite(policy);
        for (bad, told) in [(-1.0, "-1;"), (-1e-300, "-1e-300;"), (f64::NEG_INFINITY, "-inf;"), (f64::NAN, "NaN;")] {
            refused(&clip, &[9.0, bad], &["norm", told, "0 or more"]);
        }
    }
    // They go by single elements, of which such a norm says nothing.
    for policy in [NonFinite::Error, NonFinite::Drop] {
        refused(&norm().non_finite(policy), &[f64::INFINITY], &["norm", "inf", "finite"]);
    }
    refused(&agc(), &[9.0; 3], &["norm, RMS or average norm"]);
    refused(&Clip::value(1.0), &[9.0], &["norm, RMS or average norm"]);
    refused(&norm().scope(Scope::Example), &[9.0; 2], &["tensor \"b\"", "3 examples"]);
}

#[test]
fn groups_that_disagree() {
    let half = norm().grad_scale(2.0);
    let value = Clip::value(1.0);
    for path in Path::HOST {
        let refused = |first: Clip, second: Clip, words: &[&str]| {
            let set = [tensor("w", &[2, 3]), tensor("b", &[3])];
            let mut after = set.to_vec();
            let (w, b) = after.split_at_mut(1);
            let (mut w, mut b) = ([w[0].view_mut()], [b[0].view_mut()]);
            let error = path.clipper().apply_groups(&mut [(first, &mut w), (second, &mut b)]).expect_err("refused");
            assert_says(&error, words);
            assert_same_bits(&after, &set, "refused");
        };
        refused(norm(), half, &["grad_scale"]);
        refused(norm(), norm().non_finite(NonFinite::Skip), &["policy"]);
        // The value clip propagates unless told otherwise, and would have been done in its one pass.
        refused(value, norm(), &["policy"]);
        // What a later group lacks keeps the earlier ones from being written.
        refused(norm(), agc(), &["tensor \"b\"", "needs its parameter"]);
        refused(value.non_finite(NonFinite::Propagate), agc().non_finite(NonFinite::Propagate), &["tensor \"b\""]);
    }
}

#[test]
fn thresholds_of_other_gradients() {
    for path in Path::HOST {
        let apply = |clip: &Clip, threshold: &mut dyn Threshold, set: &[Data]| {
            let mut after = set.to_vec();
            let report = path.clipper().apply_adaptive(clip, threshold, &mut views_mut(&mut after, &parameters(set)));
            (report, after)
        };
        let refused = |clip: &Clip, threshold: &mut dyn Threshold, set: &[Data], words: &[&str]| {
            let (report, after) = apply(clip, threshold, set);
            assert_says(&report.expect_err("refused"), words);
            assert_same_bits(&after, set, &format!("refused by {path:?}"));
        };
        let own = [tensor("w", &[2, 3]), tensor("b", &[3])].map(|t| t.clone().with_parameter(t));
        let by_tensor = norm().scope(Scope::Tensor);
        let mut ada = AdaGc::new();
        apply(&by_tensor, &mut ada, &own).0.expect("a new state takes any");
        let before = ada.clone();
        let other = [own[0].clone(), tensor("c", &[3])];
        refused(&by_tensor, &mut ada, &other, &["tensor \"b\"", "tensor \"c\"", "AdaGc::new()"]);
        refused(&by_tensor, &mut ada, &own[..1], &["tensor \"b\"", "lack"]);
        refused(&norm(), &mut ada, &own, &["tensor \"w\"", "all tensors"]);
        assert_eq!(ada, before);
        let (mut z, mut auto) = (ZClip::new(), AutoClip::new());
        for threshold in [&mut z as &mut dyn Threshold, &mut auto] {
            refused(&by_tensor, threshold, &own, &["follows one norm", "tensor \"w\"", "AdaGc"]);
            // AGC has a threshold of its own, and a value clip none. The latter would have been done in its one pass.
            refused(&agc().scope(Scope::Global), threshold, &own, &["norm, RMS or average norm"]);
            refused(&Clip::value(1.0), threshold, &own, &["norm, RMS or average norm"]);
        }
        assert_eq!((z, auto), (ZClip::new(), AutoClip::new()));
        for (mut bad, words) in [
            (Box::new(ZClip::new().alpha(1.0)) as Box<dyn Threshold>, ["alpha is 1;", "below 1"]),
            (Box::new(AutoClip::new().history(0)), ["history is 0;", "1 or more"]),
            (Box::new(AdaGc::new().lambda_abs(f64::NAN)), ["lambda_abs is NaN;", "above 0"]),
        ] {
            refused(&norm(), &mut *bad, &own, &words);
        }
    }
}

#[cfg(feature = "serde")]
#[test]
fn thresholds_of_another_version() {
    let mut z = ZClip::new();
    z.max_norm(1.0);
    let text = serde_json::to_string(&z).expect("plain data");
    assert_eq!(serde_json::from_str::<ZClip>(&text).expect("just saved"), z);
    for (state, version) in [(&text, "2"), (&text, "0")] {
        let other = state.replace("\"version\":1", &format!("\"version\":{version}"));
        assert_ne!(&other, state);
        let message = serde_json::from_str::<ZClip>(&other).expect_err("another version").to_string();
        assert!(message.contains(&format!("version {version}")) && message.contains("reads version 1"), "{message}");
    }
    assert!(serde_json::from_str::<AdaGc>(&text).is_err(), "another threshold's state");
}

#[test]
fn running_partials_of_unfit_clips() {
    let value = Clip::value(1.0);
    let global_agc = agc().scope(Scope::Global);
    let scoped = [Scope::Tensor, Scope::Unit, Scope::Example, Scope::ExampleTensor].map(|scope| norm().scope(scope));
    for clip in [value, agc(), global_agc].into_iter().chain(scoped) {
        let error = NormAccumulator::new(&clip).expect_err("unfit");
        assert_says(&error, &["running partial", "norm, RMS or average norm", "Scope::Global"]);
    }
    let set = [tensor("w", &[2, 3])];
    let filled = |clip: &Clip| {
        let mut running = NormAccumulator::new(clip).expect("fit");
        Clipper::cpu().accumulate(&mut running, &[set[0].view()]).expect("finite");
        running
    };
    let mut running = filled(&norm());
    let before = running.clone();
    for other in [
        Clip::norm(2.0),
        norm().norm_type(NormType::L1),
        norm().grad_scale(2.0),
        norm().non_finite(NonFinite::Skip),
        Clip::rms(1.0),
    ] {
        assert_says(&running.merge(&filled(&other)).expect_err("another clip"), &["merge", "clips"]);
        assert_eq!(running, before);
    }
}

#[cfg(feature = "gpu")]
#[test]
fn shapes_in_buffers_with_another_number_of_elements() {
    use crate::common::gpu::{gpu, upload};
    let buffer = upload(gpu(), &[0; 24]);
    let tensor = gradclip::gpu::GpuTensor::f32(&buffer, ..).expect("it fits").named("w");
    for shape in [&[][..], &[5], &[2, 4], &[usize::MAX, 2]] {
        let error = tensor.clone().shape(shape).expect_err("another number");
        assert_says(&error, &["tensor \"w\"", &format!("{shape:?}"), "6 elements"]);
    }
    tensor.shape(&[2, 3]).expect("it fits");
}
