//! Gradients that are spread over ranks, clipped as one process clips them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::processes::{ProcessGroup, check_replicas};
use gradclip_mpi::gradclip::{
    Clip, ClipReport, Clipper, Dtype, Error, NonFinite, NormAccumulator, NormType, Scope, Tensor, UnitAxis,
};
use gradclip_mpi::mpi::topology::SimpleCommunicator;
use gradclip_mpi::mpi::traits::CommunicatorCollectives;

use crate::gradients::{Gradient, model, slice_range, slices, views, views_mut};
use crate::transport::barrier;

/// Clips by one norm, of which some clip and some do not.
fn global_clips() -> Vec<Clip> {
    let norm = |max_norm| Clip::norm(max_norm);
    vec![
        norm(1.0),
        norm(1e9),
        norm(0.5).norm_type(NormType::L1),
        norm(0.5).norm_type(NormType::Inf),
        norm(0.5).norm_type(NormType::p(3.0)),
        norm(1e-3).grad_scale(1024.0),
        Clip::rms(0.01),
        Clip::average_norm(1e-5),
        Clip::value(0.25),
    ]
}

/// What every rank has is the same on all.
#[track_caller]
pub(crate) fn same_on_all(group: &MpiGroup, mine: u64) {
    let mut all = vec![0u64; group.size() as usize];
    SimpleCommunicator::world().all_gather_into(&mine, &mut all[..]);
    assert!(all.iter().all(|one| *one == mine), "{all:x?}");
}

/// Float64 gradients may differ as norms may; all others have the same bits.
#[track_caller]
fn same_gradients(mine: &[Gradient], expected: &[Gradient], error: f64) {
    assert_eq!(mine.len(), expected.len());
    for (mine, expected) in mine.iter().zip(expected) {
        if mine.dtype != Dtype::F64 {
            assert!(mine == expected, "{}", mine.name);
            continue;
        }
        for (a, b) in mine.numbers().zip(expected.numbers()) {
            assert!((a - b).abs() <= error * b.abs(), "{}: {a} and {b}", mine.name);
        }
    }
}

#[track_caller]
fn same_report(mine: &ClipReport, expected: &ClipReport, error: f64) {
    let close = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a - b).abs() <= error * b.abs();
    assert!(close(mine.total_norm, expected.total_norm), "{mine:?} and {expected:?}");
    assert!(close(mine.clip_coef, expected.clip_coef), "{mine:?} and {expected:?}");
    assert_eq!((mine.clipped, mine.elements), (expected.clipped, expected.elements), "{mine:?} and {expected:?}");
    assert_eq!(mine.segments.len(), expected.segments.len());
    for (a, b) in mine.segments.iter().zip(&expected.segments) {
        assert!(close(a.norm, b.norm) && close(a.clip_coef, b.clip_coef), "{a:?} and {b:?}");
    }
}

/// How far norms may differ, as they are summed in another order.
const EXACT: f64 = 1e-12;
/// Of half-precision elements, four squares add up in float32, and where a tensor is cut decides which four.
const HALF: f64 = 1.0 / (1 << 24) as f64;

/// One process clips the whole, each rank its part of that: the same comes of it.
#[track_caller]
fn as_one_process(
    group: &Arc<MpiGroup>,
    clip: &Clip,
    whole: &[Gradient],
    error: f64,
    part: impl Fn(&[Gradient]) -> Vec<Gradient>,
) {
    let mut expected = whole.to_vec();
    let alone = Clipper::cpu().apply(clip, &mut views_mut(&mut expected)).expect("finite");
    let mut mine = part(whole);
    let within = Clipper::cpu().processes(Arc::clone(group) as _);
    let measured = within.measure(clip, &views(&mine)).expect("finite");
    let report = within.apply(clip, &mut views_mut(&mut mine)).expect("finite");
    same_report(&report, &alone, error);
    assert_eq!(report.total_norm.to_bits(), measured.total_norm.to_bits());
    same_on_all(group, report.total_norm.to_bits());
    same_on_all(group, report.clip_coef.to_bits());
    same_gradients(&mine, &part(&expected), error);
}

pub(crate) fn slices_clip_as_the_whole(group: &Arc<MpiGroup>) {
    let (rank, size) = (group.rank(), group.size());
    for clip in global_clips() {
        let cut = |whole: &[Gradient]| slices(whole, rank, size);
        as_one_process(group, &clip, &model(), HALF, cut);
        let is_half = |gradient: &Gradient| gradient.dtype.size() == 2;
        let single: Vec<_> = model().into_iter().filter(|gradient| !is_half(gradient)).collect();
        as_one_process(group, &clip, &single, EXACT, cut);
        // Whole tensors, as many as there are: some ranks have none.
        as_one_process(group, &clip, &model(), EXACT, |whole| {
            whole.iter().skip(rank as usize).step_by(size as usize).cloned().collect()
        });
    }
}

pub(crate) fn ranks_without_anything(group: &Arc<MpiGroup>) {
    let clip = Clip::norm(1.0);
    for holder in [0, group.size() - 1] {
        let part = |whole: &[Gradient]| if group.rank() == holder { whole.to_vec() } else { Vec::new() };
        as_one_process(group, &clip, &model(), EXACT, part);
    }
    as_one_process(group, &clip, &[], EXACT, <[_]>::to_vec);
}

pub(crate) fn replicas_count_once(group: &Arc<MpiGroup>) {
    // The last gradient is on every rank.
    let (rank, size) = (group.rank(), group.size());
    let is_counted = rank == size / 2;
    let part = |whole: &[Gradient]| {
        let (bias, sharded) = whole.split_last().expect("a model");
        let mut mine = slices(sharded, rank, size);
        for gradient in &mut mine {
            gradient.name = format!("{} {rank}", gradient.name);
        }
        mine.push(Gradient { counted: is_counted, ..bias.clone() });
        mine
    };
    for clip in global_clips().into_iter().take(8) {
        as_one_process(group, &clip, &model(), HALF, part);
    }
    check_replicas(&**group, &views(&part(&model()))).expect("counted once");
    // By every rank, and by none.
    for counted in [true, false] {
        let mut mine = part(&model());
        mine.last_mut().expect("the bias").counted = counted;
        let error = check_replicas(&**group, &views(&mine)).expect_err("wrong");
        let Error::Tensor { tensor, reason } = &error else { panic!("{error:?}") };
        assert!(tensor.contains("bias") && reason.contains(if counted { "times" } else { "no rank" }), "{error}");
    }
}

pub(crate) fn pieces_as_they_come(group: &Arc<MpiGroup>) {
    let clip = Clip::norm(1.0);
    let expected = Clipper::cpu().measure(&clip, &views(&model())).expect("finite");
    let mine = slices(&model(), group.rank(), group.size());
    let mut running = NormAccumulator::new(&clip).expect("valid");
    for gradient in &mine {
        Clipper::cpu().accumulate(&mut running, &[gradient.view()]).expect("fits");
    }
    running.merge_across(&**group).wait().expect("the others answer");
    let report = running.report().expect("finite");
    same_report(&report, &expected, HALF);
    same_on_all(group, report.total_norm.to_bits());
}

pub(crate) fn any_number_of_threads(group: &Arc<MpiGroup>) {
    // Large enough to be measured by several.
    let large = vec![Gradient::random("large", Dtype::F32, &[3 << 20], 0.1, 7)];
    let mine = slices(&large, group.rank(), group.size());
    let clip = Clip::norm(1.0);
    let measure = |threads: u32| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build().expect("threads");
        let within = Clipper::cpu().processes(Arc::clone(group) as _);
        pool.install(|| within.measure(&clip, &views(&mine)).expect("finite").total_norm.to_bits())
    };
    let bits = [measure(1), measure(1 + group.rank() % 3), measure(3 - group.rank() % 3)];
    assert!(bits.iter().all(|of| *of == bits[0]), "{bits:x?}");
    same_on_all(group, bits[0]);
}

pub(crate) fn many_norms_are_one_message(group: &Arc<MpiGroup>) {
    let (rank, size) = (group.rank(), group.size());
    let many: Vec<_> =
        (0..1000).map(|i| Gradient::random(&i.to_string(), Dtype::F32, &[5 + i % 7], 1.0, i as u64)).collect();
    let matrix = vec![Gradient::random("matrix", Dtype::F32, &[300, 64], 1.0, 8)];
    let per_tensor = Clip::norm(0.9).scope(Scope::Tensor);
    as_one_process(group, &per_tensor, &many, EXACT, |whole| slices(whole, rank, size));
    // Every rank has some columns of each row.
    let per_unit = Clip::norm(0.9).scope(Scope::Unit).unit_axis(UnitAxis::First);
    as_one_process(group, &per_unit, &matrix, EXACT, |whole| {
        let begin = |rank: u32| if rank == 0 { 0 } else { 1 + slice_range(63, rank, size).start };
        vec![whole[0].columns(begin(rank)..if rank + 1 == size { 64 } else { begin(rank + 1) })]
    });

    let (mine, segments) = (slices(&many, rank, size), 1000);
    let before = group.sent();
    Clipper::cpu().processes(Arc::clone(group) as _).measure(&per_tensor, &views(&mine)).expect("finite");
    let (messages, bytes) = (group.sent().messages - before.messages, group.sent().bytes - before.bytes);
    let rounds = u64::from(size.ilog2()) + u64::from(!size.is_power_of_two());
    assert!((1..=rounds).contains(&messages), "{messages} messages among {size} ranks");
    assert_eq!(bytes, messages * (64 + 64 * segments));
}

/// Each rank comes to the same decision, and knows of whom and of what.
pub(crate) fn one_nan_is_known_to_all(group: &Arc<MpiGroup>) {
    let (rank, size) = (group.rank(), group.size());
    let bad_rank = size / 2;
    let policies = [NonFinite::Error, NonFinite::Propagate, NonFinite::Skip, NonFinite::Zero, NonFinite::Drop];
    for (policy, is_late) in policies.into_iter().flat_map(|policy| [(policy, false), (policy, true)]) {
        let clip = Clip::norm(1.0).non_finite(policy);
        let sound = slices(&[Gradient::random("w", Dtype::F32, &[4000], 1.0, 9)], rank, size);
        let mut mine = vec![Gradient::random("own", Dtype::F32, &[8], 1.0, u64::from(rank)), sound[0].clone()];
        if rank == bad_rank {
            mine[1].set(3, f32::NAN);
        }
        // A higher rank's comes later.
        if is_late && rank > bad_rank {
            mine[0].set(0, f32::INFINITY);
        }
        let before = mine.clone();
        let within = Clipper::cpu().processes(Arc::clone(group) as _);
        let result = within.apply(&clip, &mut views_mut(&mut mine));
        let count = if is_late { u64::from(size - bad_rank) } else { 1 };
        let non_finite = match &result {
            Err(Error::NonFinite(elements)) if policy == NonFinite::Error => elements.clone(),
            Ok(report) if policy != NonFinite::Error => report.non_finite.clone().expect("found"),
            other => panic!("{policy:?}: {other:?}"),
        };
        assert_eq!((non_finite.count, non_finite.rank), (count, Some(bad_rank)), "{policy:?}");
        assert_eq!((non_finite.tensor, non_finite.index), (1, 3), "{policy:?}");
        assert_eq!(non_finite.name.as_deref(), Some("w"), "{policy:?}");
        let numbers = |of: &[Gradient]| of.iter().flat_map(|g| g.numbers().map(|x| x as f32)).collect::<Vec<_>>();
        let (after, before_numbers) = (numbers(&mine), numbers(&before));
        match policy {
            NonFinite::Error | NonFinite::Skip => assert!(mine == before, "{policy:?}"),
            NonFinite::Zero => assert!(after.iter().all(|x| *x == 0.0), "{policy:?}"),
            NonFinite::Drop => {
                let kept: Vec<_> = before_numbers.iter().map(|x| if x.is_finite() { *x } else { 0.0 }).collect();
                let coefficient = result.as_ref().expect("a report").clip_coef as f32;
                assert!(coefficient < 1.0);
                let close = |(a, b): (&f32, &f32)| (a - b * coefficient).abs() <= 1e-6 * b.abs();
                assert!(after.iter().zip(&kept).all(close), "{policy:?}");
                same_on_all(group, result.expect("a report").total_norm.to_bits());
            }
            _ => {
                assert!(
                    result.expect("a report").total_norm.is_nan() && after.iter().all(|x| x.is_nan()),
                    "{policy:?}"
                );
            }
        }
    }
}

/// Names and lengths of what a rank holds are its own business, under one norm.
pub(crate) fn only_the_description_must_agree(group: &Arc<MpiGroup>) {
    let rank = group.rank();
    let mine = vec![rank as f32 + 1.0; rank as usize * 100 + 1];
    let name = format!("of rank {rank}");
    let within = Clipper::cpu().processes(Arc::clone(group) as _);
    let report = within.measure(&Clip::norm(1.0), &[Tensor::new(&mine).named(&name)]).expect("finite");
    let sum: f64 = (0..group.size()).map(|r| f64::from((r + 1) * (r + 1)) * f64::from(r * 100 + 1)).sum();
    assert!((report.total_norm - sum.sqrt()).abs() <= 1e-12 * sum.sqrt());
}

/// Who has all it needs goes on to compute, and calls MPI no more for a while. Nobody waits for it.
pub(crate) fn nobody_waits_for_who_is_done(group: &Arc<MpiGroup>) {
    const COMPUTES: Duration = Duration::from_millis(1500);
    // So much that MPI does not copy it before the receiver has asked.
    let many: Vec<_> = (0..4000).map(|i| Gradient::random(&i.to_string(), Dtype::F32, &[8], 1.0, i)).collect();
    let mine = slices(&many, group.rank(), group.size());
    let per_tensor = Clip::norm(0.9).scope(Scope::Tensor);
    let within = Clipper::cpu().processes(Arc::clone(group) as _);
    for busy in [0, group.size() - 1] {
        barrier();
        let begin = Instant::now();
        within.measure(&per_tensor, &views(&mine)).expect("finite");
        let took = begin.elapsed();
        if group.rank() == busy {
            std::thread::sleep(COMPUTES);
        }
        barrier();
        assert!(took < COMPUTES / 2, "{took:?}");
    }
}
