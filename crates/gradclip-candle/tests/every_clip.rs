//! Guards against a shape, a name, a parameter or a threshold that gets lost between candle and the library: every mode,
//! scope and dtype against float64 norms, and bit by bit against the library on the same elements in row-major order.

mod common;

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use common::{all_bits, assert_near, bits, norm, store, tensor, var};
use gradclip_candle::gradclip::{
    self, AdaGc, Budget, Clip, Clipper, NormType, Scope, TensorMut, Threshold, UnitAxis, ZClip,
};
use gradclip_candle::{clip_adaptive, clip_grad_norm, clip_in_place};

/// Weights, biases and a convolution's kernel, of every dtype, some of them not contiguous; dimension 0 is 4 in all.
fn gradients(seed: u64) -> Vec<Tensor> {
    let of = |i: u64, shape: &[usize], dtype| tensor(100 * seed + i, shape, 0.5 + i as f64, dtype);
    vec![
        of(0, &[4, 6], DType::F32),
        of(1, &[4], DType::BF16),
        of(2, &[6, 4], DType::F16).t().expect("a matrix"),
        of(3, &[4, 2, 3, 3], DType::F64),
        of(4, &[1, 5], DType::F32).broadcast_as((4, 5)).expect("one row"),
        of(5, &[6, 70_000], DType::F32).narrow(0, 1, 4).expect("within"),
    ]
}

fn vars_of(gradients: &[Tensor]) -> Vec<(String, Var)> {
    let var =
        |(i, gradient): (usize, &Tensor)| (format!("layer.{i}"), var(i as u64, gradient.shape(), gradient.dtype()));
    gradients.iter().enumerate().map(var).collect()
}

/// Clips copies of the elements by the library itself, and gives their bits and the report.
fn by_the_library(
    clip: &Clip,
    threshold: Option<&mut dyn Threshold>,
    vars: &[(String, Var)],
    gradients: &[Tensor],
) -> (Vec<Option<Vec<u64>>>, gradclip::ClipReport) {
    let bytes = |tensor: &Tensor| -> Vec<u8> {
        let size = tensor.dtype().size_in_bytes();
        bits(tensor).into_iter().flat_map(|bits| bits.to_ne_bytes()[..size].to_vec()).collect()
    };
    let dtype = |tensor: &Tensor| match tensor.dtype() {
        DType::F16 => gradclip::Dtype::F16,
        DType::BF16 => gradclip::Dtype::BF16,
        DType::F32 => gradclip::Dtype::F32,
        _ => gradclip::Dtype::F64,
    };
    let mut elements: Vec<_> = gradients.iter().map(bytes).collect();
    let values: Vec<_> = vars.iter().map(|(_, var)| bytes(var)).collect();
    let mut parameters = Vec::new();
    for ((_, var), values) in vars.iter().zip(&values) {
        let parameter = gradclip::Tensor::from_bytes(dtype(var), values).and_then(|t| t.shape(var.dims()));
        parameters.push(parameter.expect("whole"));
    }
    let mut tensors = Vec::new();
    for (((gradient, elements), (name, _)), parameter) in gradients.iter().zip(&mut elements).zip(vars).zip(&parameters)
    {
        let tensor = TensorMut::from_bytes(dtype(gradient), elements).and_then(|t| t.shape(gradient.dims()));
        tensors.push(tensor.expect("whole").named(name).parameter(parameter));
    }
    let report = match threshold {
        None => Clipper::cpu().apply(clip, &mut tensors),
        Some(threshold) => Clipper::cpu().apply_adaptive(clip, threshold, &mut tensors),
    };
    drop(tensors);
    let words = |(gradient, bytes): (&Tensor, &Vec<u8>)| {
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        };
        Some(bytes.chunks(gradient.dtype().size_in_bytes()).map(word).collect())
    };
    (gradients.iter().zip(&elements).map(words).collect(), report.expect("finite"))
}

fn clips() -> Vec<Clip> {
    let norm = |max_norm| Clip::norm(max_norm);
    vec![
        norm(2.0),
        norm(0.0),
        norm(2.0).norm_type(NormType::L1),
        norm(0.1).norm_type(NormType::Inf),
        norm(2.0).norm_type(NormType::p(3.0)).eps(0.0),
        norm(2.0).grad_scale(8.0),
        norm(2.0).scope(Scope::Tensor),
        norm(0.7).scope(Scope::Unit),
        norm(0.7).scope(Scope::Unit).unit_axis(UnitAxis::Last),
        norm(2.0).scope(Scope::Example),
        norm(2.0).scope(Scope::ExampleTensor).budget(Budget::Uniform),
        norm(2.0).scope(Scope::ExampleTensor).budget(Budget::Sized),
        Clip::rms(0.3).scope(Scope::Tensor),
        Clip::average_norm(1e-3),
        Clip::agc(0.1),
        Clip::agc(0.1).unit_axis(UnitAxis::Last).agc_eps(0.5),
        Clip::value(0.75),
        Clip::range(-0.25, 1.0).grad_scale(4.0),
    ]
}

#[test]
fn every_mode_and_scope_gives_the_librarys_bits() {
    let gradients = gradients(1);
    let named = vars_of(&gradients);
    let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
    for clip in clips() {
        let (expected, by_library) = by_the_library(&clip, None, &named, &gradients);
        assert!(by_library.clipped, "{clip:?}: a clip that never clips tests nothing");
        for in_place in [false, true] {
            let owned: Vec<_> =
                gradients.iter().map(|t| if in_place { t.copy().expect("a copy") } else { t.clone() }).collect();
            let mut grads = store(vars.iter().zip(&owned));
            let report = if in_place {
                clip_in_place(&mut grads, &named, &clip, None)
            } else {
                gradclip_candle::clip(&mut grads, &named, &clip)
            };
            // As text: a value clip's norm is NaN.
            assert_eq!(format!("{:?}", report.expect("finite")), format!("{by_library:?}"), "{clip:?}");
            assert_eq!(all_bits(&grads, &vars), expected, "{clip:?}, in place {in_place}");
        }
    }
}

#[test]
fn the_global_norm_is_that_of_float64_sums() {
    let mut sets: Vec<Vec<Tensor>> =
        common::DTYPES.iter().map(|dtype| (0..3).map(|i| tensor(i, 90_001, 1.0, *dtype)).collect()).collect();
    sets.push(gradients(2));
    // Where squares in float32 overflow, or vanish.
    sets.push(vec![tensor(1, 1000, 1e20, DType::F32), tensor(2, 3, 1e25, DType::F32)]);
    sets.push(vec![tensor(1, 1000, 1e-25, DType::F32)]);
    for set in sets {
        let vars: Vec<_> = set.iter().map(|t| var(7, t.shape(), t.dtype())).collect();
        let total_norm = norm(&set);
        let mut grads = store(vars.iter().zip(&set));
        let report = clip_grad_norm(&mut grads, &vars, f64::INFINITY).expect("finite");
        assert_near(report.total_norm, total_norm, 1e-7);
        let max_norm = total_norm / 8.0;
        let clip = Clip::norm(max_norm).eps(0.0);
        gradclip_candle::clip(&mut grads, &vars, &clip).expect("finite");
        let after: Vec<_> = vars.iter().map(|var| grads.get(var).expect("there").clone()).collect();
        let coarse = set.iter().any(|t| matches!(t.dtype(), DType::F16 | DType::BF16));
        assert_near(norm(&after), max_norm, if coarse { 4e-3 } else { 1e-6 });
    }
}

#[test]
fn thresholds_follow_the_same_norms_as_the_librarys() {
    fn check<T: Threshold + Clone + PartialEq + std::fmt::Debug>(clip: &Clip, threshold: &T) {
        let (mut ours, mut in_place, mut librarys) = (threshold.clone(), threshold.clone(), threshold.clone());
        let named = vars_of(&gradients(0));
        let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
        let mut clipped = 0;
        for step in 0..8 {
            let gradients = gradients(step);
            let (expected, by_library) = by_the_library(clip, Some(&mut librarys), &named, &gradients);
            let mut grads = store(vars.iter().zip(&gradients));
            let report = clip_adaptive(&mut grads, &named, clip, &mut ours).expect("finite");
            assert_eq!((&report, &ours), (&by_library, &librarys), "step {step}");
            assert_eq!(all_bits(&grads, &vars), expected, "step {step}");
            let copies: Vec<_> = gradients.iter().map(|t| t.copy().expect("a copy")).collect();
            let mut grads = store(vars.iter().zip(&copies));
            let report = clip_in_place(&mut grads, &named, clip, Some(&mut in_place)).expect("finite");
            assert_eq!((&report, &in_place), (&by_library, &librarys), "step {step}");
            assert_eq!(all_bits(&grads, &vars), expected, "step {step}");
            clipped += usize::from(report.clipped);
        }
        assert!(clipped > 0, "{threshold:?}");
    }
    let measuring = Clip::norm(f64::INFINITY).eps(0.0);
    let zclip = ZClip::new().warm_up(3).z_threshold(0.2);
    check(&measuring, &zclip);
    let adagc = AdaGc::new().warm_up(2).lambda_rel(0.99);
    check(&measuring.scope(Scope::Tensor), &adagc);
}

/// A state by tensor must not be taken for another order's: that of a `HashMap` differs from process to process.
#[test]
fn a_state_goes_by_names() {
    let gradients = gradients(1);
    let named = vars_of(&gradients);
    let by_name = |vars: &[(String, Var)]| vars.iter().cloned().collect::<HashMap<_, _>>();
    let clip = Clip::norm(f64::INFINITY).scope(Scope::Tensor);
    let mut threshold = AdaGc::new();
    let grads = || store(named.iter().map(|(_, var)| var).zip(&gradients));
    let step = |grads: &mut GradStore, vars: &[(String, Var)], threshold: &mut AdaGc| {
        let reversed: Vec<_> = vars.iter().rev().cloned().collect();
        clip_adaptive(grads, &by_name(vars), &clip, threshold).expect("begins");
        clip_adaptive(grads, &by_name(&reversed), &clip, threshold).expect("the same names");
        clip_adaptive(grads, &reversed, &clip, threshold)
    };
    common::assert_says(step(&mut grads(), &named, &mut threshold), &["layer.0", "layer.5"]);
}

#[test]
fn the_same_gradients_give_the_same_bits_on_any_number_of_threads() {
    let gradients: Vec<_> =
        (0..20).map(|i| tensor(i, if i == 3 { 1_500_000 } else { 3_000 }, 1.0, DType::F32)).collect();
    let named = vars_of(&gradients);
    let vars: Vec<_> = named.iter().map(|(_, var)| var.clone()).collect();
    let run = |threads, clip: &Clip| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let mut grads = store(vars.iter().zip(&gradients));
        let hashed: HashMap<_, _> = named.iter().cloned().collect();
        let report = pool.install(|| gradclip_candle::clip(&mut grads, &hashed, clip)).expect("finite");
        (report.total_norm.to_bits(), report.clip_coef.to_bits(), all_bits(&grads, &vars))
    };
    for clip in [Clip::norm(1.0), Clip::value(0.9)] {
        let first = run(1, &clip);
        for threads in [1, 2, 3, 5] {
            assert!(run(threads, &clip) == first, "{clip:?} on {threads} threads");
        }
    }
}
