//! Guards against gradients that vanish without a word: float16 has nothing below 6e-8 and nothing above 65504, so
//! dividing by a loss scale may make elements 0 or infinite. The report counts them, and a wider destination keeps them.

use crate::common::{Data, Path, views_mut};
use gradclip::{Clip, ClipReport, Clipper, Dtype, NonFinite, Scope, Tensor, TensorMut, UnitAxis};
use half::{bf16, f16};

fn lost(report: &ClipReport) -> (u64, u64) {
    report.lost.map(|lost| (lost.zero, lost.infinite)).expect("what was written is counted")
}

fn clip(path: Path, clip: &Clip, numbers: &[f64], dtype: Dtype) -> (ClipReport, Data) {
    let (report, mut after) = path.clip_and_count(clip, &[Data::rounded(dtype, numbers.iter().copied())]).ok();
    (report, after.swap_remove(0))
}

/// One element is large enough to survive, eight are not.
const SMALL: [f64; 9] = [6.5e-5, -6.5e-5, 6.5e-5, 6.5e-5, 3.0, 6.5e-5, 6.5e-5, -6.5e-5, 6.5e-5];

fn clips(grad_scale: f64) -> [Clip; 4] {
    let norm = Clip::norm(1e9).grad_scale(grad_scale);
    [norm, norm.scope(Scope::Tensor), Clip::value(1e9).grad_scale(grad_scale), norm.non_finite(NonFinite::Drop)]
}

#[test]
fn a_loss_scale_takes_halves_to_0() {
    for path in Path::ALL {
        for clip_by in clips(65536.0) {
            let (report, after) = clip(*path, &clip_by, &SMALL, Dtype::F16);
            assert_eq!(lost(&report), (8, 0), "{path:?} {clip_by}");
            assert_eq!(after.numbers().filter(|x| *x == 0.0).count(), 8, "{path:?} {clip_by}");
            for dtype in [Dtype::BF16, Dtype::F32] {
                assert_eq!(lost(&clip(*path, &clip_by, &SMALL, dtype).0), (0, 0), "{path:?} {clip_by}");
            }
        }
    }
}

#[test]
fn a_loss_scale_below_1_takes_halves_to_infinity() {
    for path in Path::ALL {
        for clip_by in clips(0.125) {
            let numbers = [1.0, 60000.0, -60000.0, 8000.0, 0.0];
            let (report, after) = clip(*path, &clip_by, &numbers, Dtype::F16);
            assert_eq!((lost(&report), report.non_finite.is_none()), ((0, 2), true), "{path:?} {clip_by}");
            assert_eq!(after.get(1), f64::INFINITY, "{path:?} {clip_by}");
        }
        // What a bound holds back is not lost.
        let (report, after) = clip(*path, &Clip::value(100.0).grad_scale(0.125), &[60000.0, 1.0], Dtype::F16);
        assert_eq!((lost(&report), after.get(0)), ((0, 0), 100.0), "{path:?}");
    }
}

/// Float32, bfloat16 and float64 end too: from their smallest normal number on, elements count.
#[test]
fn every_dtype_has_an_end() {
    for path in Path::ALL {
        for dtype in path.dtypes() {
            let (tiny, grad_scale, huge) = match dtype {
                Dtype::F64 => (f64::MIN_POSITIVE, 2f64.powi(54), f64::MAX),
                Dtype::F32 => (f64::from(f32::MIN_POSITIVE), 2f64.powi(25), f64::from(f32::MAX)),
                Dtype::F16 => (f16::from_bits(1).to_f64(), 4.0, f16::MAX.to_f64()),
                _ => (bf16::MIN_POSITIVE.to_f64(), 512.0, bf16::MAX.to_f64()),
            };
            for clip_by in clips(grad_scale) {
                let (report, _) = clip(*path, &clip_by, &[tiny, 0.0, -tiny, 1.0, 3.0 * tiny], *dtype);
                assert_eq!(lost(&report), (2, 0), "{path:?} {dtype} {clip_by}");
                let (report, after) = clip(*path, &clip_by, &[tiny / 2.0, 1.0], *dtype);
                assert_eq!((lost(&report), after.get(0)), ((0, 0), 0.0), "subnormal, {path:?} {dtype} {clip_by}");
            }
            let scaled = Clip::norm(f64::INFINITY).grad_scale(0.5);
            for clip_by in [scaled, Clip::value(f64::INFINITY).grad_scale(0.5)] {
                let (report, _) = clip(*path, &clip_by, &[huge, 0.0, -huge, 1.0], *dtype);
                assert_eq!(lost(&report), (0, 2), "{path:?} {dtype} {clip_by}");
            }
        }
    }
}

#[test]
fn what_is_meant_to_become_0_is_not_lost() {
    for path in Path::ALL {
        for clip_by in [Clip::norm(0.0), Clip::value(0.0), Clip::range(0.0, 1.0), Clip::norm(1.0)] {
            let (report, _) = clip(*path, &clip_by, &[1.0, -2.0, 0.0], Dtype::F16);
            assert_eq!(lost(&report), (0, 0), "{path:?} {clip_by}");
        }
        // Negative elements go to the bound; positive ones are lost.
        let (report, _) = clip(*path, &Clip::range(0.0, 1.0).grad_scale(65536.0), &SMALL, Dtype::F16);
        assert_eq!(lost(&report), (6, 0), "{path:?}");
        let zeroed = Clip::norm(1.0).grad_scale(65536.0).non_finite(NonFinite::Zero);
        let (report, _) = clip(*path, &zeroed, &[f64::NAN, 6.5e-5], Dtype::F16);
        assert_eq!(lost(&report), (0, 0), "{path:?}");
    }
}

/// Rows and columns of factors of their own: only some lose what they hold.
#[test]
fn each_segment_loses_by_its_own_factor() {
    let (rows, columns) = (37, 53);
    let numbers = |by: fn(usize, usize) -> bool| {
        (0..rows * columns).map(move |i| match (by(i / columns, i % columns), i % 3) {
            (true, 0) => 6.5e-5,
            (true, _) => 1000.0,
            (false, _) => 6.5e-5,
        })
    };
    type IsLarge = fn(usize, usize) -> bool;
    let cases: [(UnitAxis, IsLarge); 2] =
        [(UnitAxis::First, |row, _| row % 2 == 0), (UnitAxis::Last, |_, column| column % 2 == 0)];
    for path in Path::ALL {
        for (axis, by) in cases {
            let data = Data::rounded(Dtype::F16, numbers(by)).shaped(&[rows, columns]);
            let clip = Clip::norm(0.1).scope(Scope::Unit).unit_axis(axis);
            let (report, after) = path.clip_and_count(&clip, std::slice::from_ref(&data)).ok();
            let became = data.numbers().zip(after[0].numbers()).filter(|(x, y)| *x != 0.0 && *y == 0.0).count();
            assert!(became > 200, "{became}");
            assert_eq!(lost(&report), (became as u64, 0), "{path:?} {axis}");
        }
    }
}

/// Words that tensors share, and long tensors, whose blocks are clipped at once.
#[test]
fn every_element_counts_once() {
    for path in Path::ALL {
        for len in [1, 2, 3, 31, 33, 4095, 70_001] {
            for clip_by in clips(65536.0) {
                let set = [1, len, 3].map(|len| Data::rounded(Dtype::F16, (0..len).map(|i| SMALL[i % 9])));
                let kept: usize = set.iter().map(|data| data.numbers().filter(|x| *x == 3.0).count()).sum();
                let (report, _) = path.clip_and_count(&clip_by, &set).ok();
                assert_eq!(lost(&report), ((len + 4 - kept) as u64, 0), "{path:?} {len} {clip_by}");
            }
        }
    }
}

#[test]
fn groups_pieces_and_accumulated_norms_count() {
    let small = Data::rounded(Dtype::F16, SMALL);
    let clip = Clip::norm(1e9).grad_scale(65536.0);
    for path in Path::HOST {
        let mut sets = [small.clone(), Data::rounded(Dtype::F16, [1.0, 2.0]), small.clone()];
        let [a, b, c] = sets.each_mut().map(|data| [data.view_mut()]);
        let (mut a, mut b, mut c) = (a, b, c);
        let value = Clip::value(1e9).grad_scale(65536.0).non_finite(NonFinite::Error);
        let groups = &mut [(clip, &mut a[..]), (clip, &mut b[..]), (value, &mut c[..])];
        let reports = path.clipper().apply_groups(groups).expect("they are finite");
        assert_eq!(reports.iter().map(lost).collect::<Vec<_>>(), [(8, 0), (0, 0), (8, 0)], "{path:?}");
        let measured = path.clipper().measure(&clip, &[small.view()]).expect("finite");
        assert_eq!(measured.lost, None, "nothing is written");
    }
    let decided = Clipper::cpu().decide(&clip, &[small.view()]).expect("finite");
    for (first, count) in [(0, 4), (4, 5)] {
        let mut piece = Data::from_bytes(Dtype::F16, small.bytes[2 * first..][..2 * count].to_vec());
        decided.apply(0, first as u64, &mut piece.view_mut()).expect("it fits");
    }
    assert_eq!(lost(&decided.report()), (8, 0));

    let mut running = gradclip::NormAccumulator::new(&clip).expect("a clip by norm");
    Clipper::cpu().accumulate(&mut running, &[small.view()]).expect("finite");
    let mut after = [small.clone()];
    let report = Clipper::cpu().finish(&running, &mut views_mut(&mut after, &[None])).expect("finite");
    assert_eq!(lost(&report), (8, 0));
    let mut after = [small];
    let report = Clipper::cpu().scale(&clip, &[5.0], &mut views_mut(&mut after, &[None])).expect("finite");
    assert_eq!(lost(&report), (8, 0));
}

/// A destination of a wider dtype.
#[test]
fn float32_keeps_what_halves_lose() {
    let halves = SMALL.map(f16::from_f64);
    for path in Path::HOST {
        for clip_by in clips(65536.0) {
            let mut wide = [7f32; 9];
            let into = &mut [TensorMut::new(&mut wide)];
            let report = path.clipper().apply_into(&clip_by, &[Tensor::new(&halves)], into).expect("it fits");
            assert_eq!(lost(&report), (0, 0), "{path:?} {clip_by}");
            assert_eq!(wide, halves.map(|x| x.to_f32() / 65536.0), "{path:?} {clip_by}");
        }
    }
    // In pieces.
    let decided = Clipper::cpu().decide(&clips(65536.0)[0], &[Tensor::new(&halves)]).expect("finite");
    let mut wide = [0f32; 5];
    Tensor::new(&halves[4..]).widen_into(&mut TensorMut::new(&mut wide)).expect("float32 holds them");
    decided.apply(0, 4, &mut TensorMut::new(&mut wide)).expect("it fits");
    assert_eq!((wide[0], lost(&decided.report())), (3.0 / 65536.0, (0, 0)));
}

#[test]
fn every_element_is_widened_exactly() {
    let halves: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
    let brains: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let (mut single, mut double) = (vec![0f32; halves.len()], vec![0f64; halves.len()]);
    let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    Tensor::new(&halves).widen_into(&mut TensorMut::new(&mut single)).expect("it fits");
    Tensor::new(&brains).widen_into(&mut TensorMut::new(&mut double)).expect("it fits");
    assert!(halves.iter().zip(&single).all(|(half, x)| same(half.to_f64(), f64::from(*x))));
    assert!(brains.iter().zip(&double).all(|(half, x)| same(half.to_f64(), *x)));
    Tensor::new(&single).widen_into(&mut TensorMut::new(&mut double)).expect("it fits");
    assert!(single.iter().zip(&double).all(|(a, b)| same(f64::from(*a), *b)));
}

#[test]
fn a_destination_that_does_not_fit_is_an_error() {
    let (single, double) = ([1f32, 2.0], [1f64, 2.0]);
    let clip = Clip::norm(1.0);
    let clipper = Clipper::cpu();
    let mut halves = [f16::ONE; 2];
    let error = clipper.apply_into(&clip, &[Tensor::new(&single).named("w")], &mut [TensorMut::new(&mut halves)]);
    crate::common::assert_says(&error.unwrap_err(), &["\"w\"", "float32", "float16", "wider"]);
    let mut brains = [bf16::ONE; 2];
    let error = clipper.apply_into(&clip, &[Tensor::new(&halves)], &mut [TensorMut::new(&mut brains)]);
    crate::common::assert_says(&error.unwrap_err(), &["tensor 0", "float16", "bfloat16"]);
    let mut narrow = [9f32; 2];
    let error = clipper.apply_into(&clip, &[Tensor::new(&double)], &mut [TensorMut::new(&mut narrow)]);
    crate::common::assert_says(&error.unwrap_err(), &["float64"]);
    let error = clipper.apply_into(&clip, &[Tensor::new(&single)], &mut [TensorMut::new(&mut narrow[..1])]);
    crate::common::assert_says(&error.unwrap_err(), &["2 elements", "1"]);
    let error = clipper.apply_into(&clip, &[Tensor::new(&single)], &mut []);
    crate::common::assert_says(&error.unwrap_err(), &["1 tensors", "0 destinations"]);
    assert_eq!((narrow, halves, brains), ([9.0; 2], [f16::ONE; 2], [bf16::ONE; 2]));
    let decided = clipper.decide(&clip, &[Tensor::new(&single)]).expect("finite");
    let error = decided.apply(0, 0, &mut TensorMut::new(&mut halves));
    crate::common::assert_says(&error.unwrap_err(), &["float16", "float32"]);
}

/// Each rank counts its own part.
#[test]
fn ranks_count_their_own_parts() {
    let ranks = gradclip::processes::thread_group(2, None).into_iter().zip([1, 9]).map(|(group, len)| {
        std::thread::spawn(move || {
            let mut mine: Vec<_> = SMALL[..len].iter().map(|x| f16::from_f64(*x)).collect();
            let clip = Clip::norm(1e9).grad_scale(65536.0);
            let mut wide = vec![0f32; len];
            let clipper = Clipper::cpu().processes(group);
            let into = &mut [TensorMut::new(&mut wide)];
            let widened = clipper.apply_into(&clip, &[Tensor::new(&mine)], into).expect("all is finite");
            let report = clipper.apply(&clip, &mut [TensorMut::new(&mut mine)]).expect("all is finite");
            (lost(&widened), lost(&report))
        })
    });
    let counts: Vec<_> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no panic")).collect();
    assert_eq!(counts, [((0, 0), (1, 0)), ((0, 0), (8, 0))]);
}

#[cfg(feature = "gpu")]
mod plans {
    use super::{SMALL, lost};
    use crate::common::gpu::{Held, counter, encoder, gpu, gpu_tensor, step, upload};
    use crate::common::{Data, assert_says};
    use gradclip::gpu::{GpuPlan, PlanOptions};
    use gradclip::{Clip, Dtype, NonFinite, Optimizer, Skipped};

    const CLIP: fn() -> Clip = || Clip::norm(1e9).grad_scale(65536.0).non_finite(NonFinite::Skip);

    fn counting() -> PlanOptions {
        PlanOptions::default().count_lost()
    }

    fn lost_by_group(plan: &GpuPlan) -> Vec<(u64, u64)> {
        plan.reports().wait().expect("the device works").iter().map(lost).collect()
    }

    /// Each step counts anew: groups, halves of a step, skipped steps and other buffers alike.
    #[test]
    fn each_step_counts_anew() {
        let data = |numbers: &[f64]| vec![Data::rounded(Dtype::F16, numbers.iter().copied())];
        let mut held = [&SMALL[..], &[1.0, 2.0], &SMALL[..5]].map(|numbers| Held::new(counter(), data(numbers), 1));
        let views = held.each_ref().map(Held::views);
        // The last is clamped in the pass that looks at it.
        let value = Clip::value(1e9).grad_scale(65536.0).non_finite(NonFinite::Skip);
        let groups = [(CLIP(), &views[0][..]), (CLIP(), &views[1]), (value, &views[2])];
        let mut plan = counter().plan_with(&groups, counting()).expect("they fit");
        step(counter(), &plan);
        assert_eq!(lost_by_group(&plan), [(8, 0), (0, 0), (4, 0)]);
        step(counter(), &plan);
        assert_eq!(lost_by_group(&plan), [(1, 0), (2, 0), (1, 0)], "3, 1 and 2 over 65536 are lost now");
        held[0].write(data(&SMALL));
        let mut halves = encoder(counter());
        plan.encode_measure(&mut halves).expect("the device works");
        plan.encode_scale(&mut halves).expect("the device works");
        counter().queue().submit([halves.finish()]);
        assert_eq!(lost_by_group(&plan), [(8, 0), (0, 0), (0, 0)]);
        held[1].write(data(&[1.0, f64::NAN]));
        step(counter(), &plan);
        assert_eq!(lost_by_group(&plan), [(0, 0); 3]);
        assert_eq!(plan.report().wait().expect("it runs").skipped, Some(Skipped::NonFinite));
        let others = [&SMALL[..], &[1.0, 2.0], &SMALL[..5]].map(|numbers| Held::new(counter(), data(numbers), 2));
        let views = others.each_ref().map(Held::views);
        plan.update(&[&views[0], &views[1], &views[2]]).expect("the shapes are the same");
        step(counter(), &plan);
        assert_eq!(lost_by_group(&plan), [(8, 0), (0, 0), (4, 0)]);
        let profile = plan.profile().wait().expect("the device works");
        assert_eq!(profile.reports.iter().map(lost).collect::<Vec<_>>(), [(1, 0), (2, 0), (1, 0)]);
    }

    #[test]
    fn given_norms_count_and_what_writes_no_gradient_does_not() {
        let held = Held::new(counter(), vec![Data::rounded(Dtype::F16, SMALL)], 0);
        let norm = Data::of(&[4.6e-5f32]);
        let norm = gpu_tensor(&upload(counter(), &norm.bytes), &norm, 0);
        let clip = CLIP();
        let plan = counter().plan_with(&[(clip, &held.views())], counting().norms(&norm)).expect("it fits");
        step(counter(), &plan);
        assert_eq!(lost_by_group(&plan), [(8, 0)]);
        let uncounted = counter().plan(&clip, &held.views()).expect("it fits");
        step(counter(), &uncounted);
        assert_eq!(uncounted.report().wait().expect("it runs").lost, None);
        for options in [counting().measure_only(), counting().optimizer(Optimizer::sgd(0.1))] {
            let error = gpu().plan_with(&[(clip, &[])], options).expect_err("no gradient is written");
            assert_says(&error, &["count_lost", "write"]);
        }
    }
}
