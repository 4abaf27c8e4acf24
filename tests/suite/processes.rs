//! Guards against ranks, here threads, that clip their parts differently from one process that holds all.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::numbers::Random;
use crate::common::reference::uneven;
use crate::common::{Data, Done, POLICIES, Path, assert_norm, assert_same_bits, assert_says, clip_host};
#[cfg(feature = "gpu")]
use crate::common::{gpu, gpu::Layout};
use gradclip::processes::{ProcessGroup, agree, check_replicas, thread_group};
use gradclip::{AutoClip, Budget, Clip, ClipReport, Clipper, Dtype, Error, NonFinite, NormType};
use gradclip::{NormAccumulator, Scope, Skipped, TensorMut, UnitAxis, ZClip};

/// Runs each rank on a thread of its own.
fn on_ranks<R: Send, T: Send>(ranks: Vec<R>, run: impl Fn(Arc<dyn ProcessGroup>, R) -> T + Sync) -> Vec<T> {
    let groups = thread_group(ranks.len() as u32, Some(Duration::from_secs(60)));
    std::thread::scope(|scope| {
        let start = |(group, rank)| {
            let run = &run;
            scope.spawn(move || run(group, rank))
        };
        let running: Vec<_> = groups.into_iter().zip(ranks).map(start).collect();
        running.into_iter().map(|rank| rank.join().expect("a rank panicked")).collect()
    })
}

/// Clips a rank's tensors on a path.
fn clip_within(path: Path, clip: &Clip, group: &Arc<dyn ProcessGroup>, set: &[Data]) -> Done {
    match path {
        #[cfg(feature = "gpu")]
        Path::GpuBuffers => {
            let gpu = gpu::gpu();
            let layout = Layout::with_gaps(set, |i| [1, 0, 3][i % 3]);
            let buffer = gpu::upload(gpu, &layout.bytes(set));
            let views = gpu::with_parameters(gpu, layout.tensors(&buffer, set), set);
            let run = || {
                let plan = gpu.plan(clip, &views)?;
                let mut encoder = gpu::encoder(gpu);
                plan.encode_measure(&mut encoder)?;
                gpu.queue().submit([encoder.finish()]);
                plan.merge_across(&**group).wait()?;
                let mut encoder = gpu::encoder(gpu);
                plan.encode_scale(&mut encoder)?;
                gpu.queue().submit([encoder.finish()]);
                plan.report().wait()
            };
            let report = run();
            Done { report, after: layout.taken_from(&gpu::download(gpu, &buffer), set) }
        }
        _ => clip_host(&path.clipper().processes(group.clone()), clip, set),
    }
}

/// What ranks hold, by turns.
fn dealt(set: &[Data], ranks: usize) -> Vec<Vec<Data>> {
    (0..ranks).map(|rank| set.iter().skip(rank).step_by(ranks).cloned().collect()).collect()
}

/// Tensors of all dtypes of a path, of lengths that end anywhere, one without elements.
fn tensors(path: Path, random: &mut Random) -> Vec<Data> {
    let lengths = [70_001, 3, 0, 5_000, 129, 33_333, 1, 64];
    let of = |(i, len): (usize, &usize)| {
        let dtypes = path.dtypes();
        uneven(dtypes[i % dtypes.len()], &[*len], random).named(&format!("t{i}"))
    };
    lengths.iter().enumerate().map(of).collect()
}

/// What ranks may differ by from one process. Tensors that are whole have the same partials there; they merge in another order.
const REORDERED: f64 = 1e-12;

/// Checks that the ranks did what one process does, up to a relative error of the norm.
fn assert_as_one(
    whole: &Done,
    ranks: &[Done],
    tolerance: f64,
    parts: impl Fn(usize, &[Data]) -> Vec<Data>,
    what: &str,
) {
    let of_all = whole.report.as_ref().expect("one process clips");
    for (rank, done) in ranks.iter().enumerate() {
        let what = format!("{what}, rank {rank}");
        let report = done.report.as_ref().unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_norm(report.total_norm, of_all.total_norm, tolerance, &what);
        assert_eq!((report.clipped, report.elements), (of_all.clipped, of_all.elements), "{what}");
        for (got, want) in done.after.iter().zip(&parts(rank, &whole.after)) {
            // The last bits of a float64 are those of the coefficient.
            if tolerance == REORDERED && got.dtype != Dtype::F64 {
                assert!(got.bytes == want.bytes, "{what}: {got:?}, {want:?}");
            } else {
                assert_close(got, want, tolerance, &what);
            }
        }
    }
    // To the bit, whatever it is.
    let norms: Vec<_> =
        ranks.iter().map(|done| done.report.as_ref().expect("told above").total_norm.to_bits()).collect();
    assert!(norms.iter().all(|norm| *norm == norms[0]), "{what}: {norms:x?}");
}

/// Up to a relative error of the coefficient and its rounding, and the rounding of the result.
fn assert_close(got: &Data, want: &Data, tolerance: f64, what: &str) {
    for (a, b) in got.numbers().zip(want.numbers()) {
        let slack =
            b.abs() * tolerance + if got.dtype == Dtype::F64 { 0.0 } else { crate::common::numbers::ulp(got.dtype, b) };
        assert!((a - b).abs() <= slack, "{what}: {a:e}, {b:e}");
    }
}

#[test]
fn any_number_of_ranks_clips_as_one_process() {
    for path in Path::ALL {
        let set = tensors(*path, &mut Random(1));
        let norm_types = [NormType::L2, NormType::L1, NormType::Inf, NormType::p(3.0)];
        let by_norm = norm_types.map(|norm_type| Clip::norm(0.5).norm_type(norm_type));
        let others = [Clip::rms(1e-3), Clip::average_norm(1e-6), Clip::norm(1e30), Clip::norm(0.0)];
        let clips = by_norm.into_iter().chain(others);
        for clip in clips.flat_map(|clip| [clip, clip.grad_scale(8.0)]) {
            let whole = path.clip(&clip, &set);
            // Of nine some have nothing.
            let sizes: &[usize] = if *path == Path::Cpu { &[1, 2, 3, 4, 7, 8, 9] } else { &[2, 3] };
            for size in sizes {
                let ranks = on_ranks(dealt(&set, *size), |group, own| clip_within(*path, &clip, &group, &own));
                let part = |rank: usize, all: &[Data]| all.iter().skip(rank).step_by(*size).cloned().collect();
                let tolerance = if *path == Path::Cpu { REORDERED } else { path.norm_tolerance() };
                assert_as_one(&whole, &ranks, tolerance, part, &format!("{path:?}, {size} ranks, {clip:?}"));
            }
        }
    }
}

/// Some columns of a matrix, with those of its parameter.
fn columns(of: &Data, range: Range<usize>) -> Data {
    let dims = of.dims();
    let mut bytes = Vec::new();
    for row in 0..dims[0] {
        let at = |column: usize| (row * dims[1] + column) * of.dtype.size();
        bytes.extend_from_slice(&of.bytes[at(range.start)..at(range.end)]);
    }
    let part = Data::from_bytes(of.dtype, bytes).shaped(&[dims[0], range.len()]);
    match &of.parameter {
        Some(parameter) => part.with_parameter(columns(parameter, range)),
        None => part,
    }
}

#[test]
fn slices_of_tensors_share_the_norms_of_their_segments() {
    // Three ranks hold uneven slices of every matrix, which cut each unit and each example; of the last the first has nothing.
    let cuts = [0.0..0.2, 0.2..0.5, 0.5..1.0f64];
    let slices = |all: &[Data], rank: usize| -> Vec<Data> {
        let slice = |of: &Data| {
            let at = |part: f64| (of.dims()[1] as f64 * part) as usize;
            columns(of, at(cuts[rank].start)..at(cuts[rank].end))
        };
        all.iter().map(slice).collect()
    };
    for path in Path::ALL {
        let mut random = Random(2);
        let dtypes = path.dtypes();
        let mut of = |i: usize, shape: &[usize]| {
            let parameter = uneven(Dtype::F32, shape, &mut random);
            uneven(dtypes[i % dtypes.len()], shape, &mut random).with_parameter(parameter)
        };
        let set = [of(0, &[6, 1000]), of(1, &[6, 77]), of(2, &[6, 40]), of(3, &[6, 2])];
        let by_tensor = Clip::norm(1e-2).scope(Scope::ExampleTensor);
        let clips = [
            Clip::norm(0.3).scope(Scope::Tensor),
            Clip::rms(1e-3).scope(Scope::Tensor),
            Clip::norm(0.1).scope(Scope::Unit),
            Clip::norm(0.1).scope(Scope::Example),
            by_tensor.budget(Budget::Sized),
            by_tensor.budget(Budget::Uniform),
            Clip::agc(0.01),
        ];
        for clip in clips {
            let whole = path.clip(&clip, &set);
            let ranks = (0..3).map(|rank| slices(&set, rank)).collect();
            let ranks = on_ranks(ranks, |group, own: Vec<Data>| clip_within(*path, &clip, &group, &own));
            let tolerance = path.norm_tolerance();
            assert_as_one(&whole, &ranks, tolerance, |rank, all| slices(all, rank), &format!("{path:?}, {clip:?}"));
            let of_all = &whole.report.as_ref().expect("told above").segments;
            for done in &ranks {
                let own = &done.report.as_ref().expect("told above").segments;
                assert_eq!(own.len(), of_all.len());
                for (own, all) in own.iter().zip(of_all) {
                    assert_norm(own.norm, all.norm, path.norm_tolerance(), "a segment");
                    assert_eq!((own.tensor, own.index, own.clipped), (all.tensor, all.index, all.clipped));
                }
            }
        }
    }
}

#[test]
fn a_replica_counts_once_and_is_scaled_everywhere() {
    for path in Path::ALL {
        let mut random = Random(3);
        let dtype = path.dtypes()[0];
        let shared = uneven(dtype, &[4000], &mut random).named("shared");
        let own: Vec<_> = (0..3).map(|i| uneven(dtype, &[1000 + i], &mut random).named(&format!("w{i}"))).collect();
        for clip in [Clip::norm(0.5), Clip::rms(1e-4), Clip::value(1e-3)] {
            if *path != Path::Cpu && clip == Clip::value(1e-3) {
                continue; // Below, by another way.
            }
            let whole = path.clip(&clip, &[&own[..], std::slice::from_ref(&shared)].concat());
            let ranks = (0..3).map(|rank| {
                // Between others, so that what is measured is not what is scaled.
                let replica = if rank == 1 { shared.clone() } else { shared.clone().uncounted() };
                vec![replica, own[rank].clone()]
            });
            let ranks = on_ranks(ranks.collect(), |group, own: Vec<Data>| clip_within(*path, &clip, &group, &own));
            let want = |rank: usize, all: &[Data]| vec![all[3].clone(), all[rank].clone()];
            let tolerance = if *path == Path::Cpu { REORDERED } else { path.norm_tolerance() };
            assert_as_one(&whole, &ranks, tolerance, want, &format!("{path:?}, {clip:?}"));
        }
    }
}

#[test]
fn outside_a_group_what_is_not_counted_is_scaled_all_the_same() {
    for path in Path::ALL {
        let set = [Data::of(&[3.0f32, 4.0]), Data::of(&[8.0f32, 6.0]).uncounted()];
        for (clip, want) in [
            (Clip::norm(1.0).eps(0.0), [0.6f32, 0.8, 1.6, 1.2]),
            (Clip::value(5.0), [3.0, 4.0, 5.0, 5.0]),
            (Clip::value(5.0).non_finite(NonFinite::Error), [3.0, 4.0, 5.0, 5.0]),
        ] {
            let (report, after) = path.clip(&clip, &set).ok();
            assert_eq!(report.elements, 2, "{path:?}");
            let got: Vec<_> = after.iter().flat_map(Data::numbers).collect();
            let close = got.iter().zip(want).all(|(got, want)| (got - f64::from(want)).abs() < 1e-6);
            assert!(close, "{path:?}, {clip:?}: {got:?}");
        }
    }
}

#[test]
fn a_bad_element_on_one_rank_is_known_to_all() {
    for path in Path::ALL {
        for (policy, value) in POLICIES.into_iter().flat_map(|policy| [(policy, f64::NAN), (policy, f64::INFINITY)]) {
            let mut set: Vec<_> = (0..6).map(|i| Data::of(&[1.0f32 + i as f32; 100]).named(&format!("t{i}"))).collect();
            // On rank 1 of 3, as its second tensor.
            set[4].set(7, value);
            set[5].set(3, value);
            let clip = Clip::norm(1.0).non_finite(policy);
            let whole = path.clip(&clip, &set);
            let ranks = on_ranks(dealt(&set, 3), |group, own| clip_within(*path, &clip, &group, &own));
            for (rank, done) in ranks.iter().enumerate() {
                let what = format!("{path:?}, {policy:?}, {value}, rank {rank}");
                let want: Vec<_> = whole.after.iter().skip(rank).step_by(3).cloned().collect();
                let found = match (&done.report, &whole.report) {
                    (Err(Error::NonFinite(found)), Err(Error::NonFinite(_))) => found,
                    (Ok(report), Ok(of_all)) => {
                        let same = |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || ((a - b) / b).abs() < 1e-6;
                        assert!(same(report.total_norm, of_all.total_norm), "{what}: {report:?}");
                        assert!(same(report.clip_coef, of_all.clip_coef), "{what}: {report:?}");
                        report.non_finite.as_ref().expect("found")
                    }
                    other => panic!("{what}: {other:?}"),
                };
                let name = found.name.as_deref();
                assert_eq!(
                    (found.count, found.rank, found.tensor, name, found.index),
                    (2, Some(1), 1, Some("t4"), 7),
                    "{what}"
                );
                assert_says(&Error::NonFinite(found.clone()), &["index 7", "\"t4\"", "rank 1"]);
                for (got, want) in done.after.iter().zip(&want) {
                    let same =
                        |(a, b): (f64, f64)| (a - b).abs() <= 1e-6 * b.abs() || a == b || (a.is_nan() && b.is_nan());
                    assert!(got.numbers().zip(want.numbers()).all(same), "{what}: {got:?}, {want:?}");
                }
            }
        }
    }
}

#[test]
fn value_clips_decide_together() {
    for path in Path::HOST {
        for policy in POLICIES {
            let clip = Clip::value(0.5).non_finite(policy).report_norm(true);
            let set = [Data::of(&[0.25f32, 2.0]), Data::of(&[f32::NAN, 1.0]), Data::of(&[0.25f32, -0.25])];
            let whole = path.clip(&clip, &set);
            let ranks = on_ranks(dealt(&set, 3), |group, own| clip_within(*path, &clip, &group, &own));
            for (done, want) in ranks.iter().zip(&whole.after) {
                let what = format!("{path:?}, {policy:?}");
                assert_same_bits(&done.after, std::slice::from_ref(want), &what);
                match (&done.report, &whole.report) {
                    (Ok(own), Ok(all)) => {
                        assert_eq!((own.clipped, own.elements), (all.clipped, all.elements), "{what}");
                        assert_norm(own.total_norm, all.total_norm, 1e-6, &what);
                    }
                    (Err(_), Err(_)) => {}
                    other => panic!("{what}: {other:?}"),
                }
            }
        }
    }
}

/// A rank that fails before it has measured tells the others, and all go on with the next call.
#[test]
fn a_rank_that_fails_fails_all_and_the_next_call_works() {
    for path in Path::HOST {
        let clip = Clip::norm(1.0).scope(Scope::Example);
        for (size, bad) in [(2, 0), (3, 2), (5, 1), (6, 3), (8, 7)] {
            let results = on_ranks((0..size).collect(), |group, rank: usize| {
                let good = [Data::of(&[3.0f32; 4]).shaped(&[2, 2])];
                let unlike = [Data::of(&[3.0f32; 4]).shaped(&[2, 2]), Data::of(&[1.0f32; 3]).shaped(&[3, 1])];
                let clipper = path.clipper().processes(group);
                let first = clip_host(&clipper, &clip, if rank == bad { &unlike } else { &good });
                assert_same_bits(&first.after, if rank == bad { &unlike } else { &good }, "nothing is written");
                (first.report.expect_err("one fails"), clip_host(&clipper, &clip, &good).ok().0)
            });
            for (rank, (error, report)) in results.iter().enumerate() {
                match error {
                    Error::Tensor { .. } if rank == bad => {}
                    Error::PeerFailed { rank: told } if rank != bad => assert_eq!(*told as usize, bad),
                    other => panic!("rank {rank} of {size}: {other}"),
                }
                assert_norm(report.segments[0].norm, (18.0 * size as f64).sqrt(), 1e-6, "the next call");
            }
        }
    }
}

#[test]
fn ranks_that_are_not_called_alike_all_get_an_error() {
    let by = |max_norm| Clip::norm(max_norm);
    let by_tensor = by(1.0).scope(Scope::Tensor);
    let odd: [(Clip, Clip, usize, &str); 5] = [
        (by(1.0), by(2.0), 1, "another clip"),
        (by(1.0), by(1.0).norm_type(NormType::L1), 1, "another clip"),
        (by(1.0), by(1.0).non_finite(NonFinite::Skip), 1, "another clip"),
        (by(1.0), by_tensor, 2, "segments"),
        (by_tensor, by_tensor, 3, "3"),
    ];
    for (clip, other, of_other, words) in odd {
        for (size, odd_one) in [(2, 1), (3, 0), (4, 2), (7, 6)] {
            let errors = on_ranks((0..size).collect(), |group, rank: usize| {
                let (clip, count) = if rank == odd_one { (other, of_other) } else { (clip, 1) };
                let set = vec![Data::of(&[2.0f32; 5]); count];
                let done = clip_host(&Clipper::cpu().processes(group), &clip, &set);
                assert_same_bits(&done.after, &set, "nothing is written");
                done.report.expect_err("they disagree")
            });
            for error in &errors {
                let Error::Disagreement { .. } = error else { panic!("{error}") };
                assert_eq!(error.to_string(), errors[0].to_string());
            }
            assert_says(&errors[0], &[words]);
        }
    }
}

/// Both are told, and the next call is the same for both.
#[test]
fn a_rank_that_calls_once_too_often_is_found_out() {
    let errors = on_ranks(vec![0, 1], |group, rank| {
        let clipper = Clipper::cpu().processes(group.clone());
        let clip = |x| clipper.apply(&Clip::norm(1.0), &mut [TensorMut::new(&mut [x])]);
        clip(1.0f32).expect("both");
        group.calls().fetch_add(rank, std::sync::atomic::Ordering::Relaxed);
        let error = clip(1.0).expect_err("ranks are in different calls");
        clip(1.0).expect("both");
        error
    });
    assert_says(&errors[0], &["rank 1", "1 calls ahead"]);
    assert!(matches!(errors[1], Error::PeerFailed { rank: 0 }), "{errors:?}");
}

#[test]
fn a_silent_rank_ends_the_wait_of_the_others() {
    let wait = Duration::from_millis(200);
    let begun = Instant::now();
    let mut groups = thread_group(2, Some(wait)).into_iter();
    let (waiting, silent) = (groups.next().expect("two"), groups.next().expect("two"));
    let clipper = Clipper::cpu().processes(waiting);
    let mut data = [3.0f32, 4.0];
    let mut clip = || clipper.apply(&Clip::norm(1.0), &mut [TensorMut::new(&mut data)]);
    assert_says(&clip().expect_err("nobody answers"), &["rank 1", "0.2 s"]);
    assert!(begun.elapsed() >= wait);
    drop(silent);
    assert_says(&clip().expect_err("it has gone"), &["rank 1", "left the group"]);
    assert_eq!(data, [3.0, 4.0]);
}

#[test]
fn thresholds_follow_the_norm_of_all_ranks() {
    for path in Path::HOST {
        let steps: Vec<_> =
            (0..30).map(|i| Data::rounded(Dtype::F32, Random(i).normals(64, 1.0 + (i % 7) as f64))).collect();
        let half = |of: &Data, rank: usize| Data::rounded(Dtype::F32, of.numbers().skip(32 * rank).take(32));
        let clip = Clip::norm(f64::INFINITY);
        let run = |clipper: &Clipper, of: &dyn Fn(&Data) -> Data| {
            let mut zclip = ZClip::new().warm_up(5);
            let mut autoclip = AutoClip::new().percentile(50.0);
            let mut coefficients = Vec::new();
            for step in &steps {
                let mut data = of(step);
                for threshold in [&mut zclip as &mut dyn gradclip::Threshold, &mut autoclip] {
                    let report = clipper.apply_adaptive(&clip, threshold, &mut [data.view_mut()]).expect("finite");
                    coefficients.push(report.clip_coef);
                }
            }
            coefficients
        };
        let whole = run(&path.clipper(), &Data::clone);
        assert!(whole.iter().any(|c| *c < 1.0));
        let ranks = on_ranks(vec![0, 1], |group, rank| run(&path.clipper().processes(group), &|of| half(of, rank)));
        for rank in ranks {
            assert!(rank.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5), "{path:?}: {rank:?}, {whole:?}");
        }
    }
}

/// The device computes the thresholds of one group from parameters. Those of another depend on the number of elements of
/// all ranks.
#[test]
fn groups_of_different_kinds_merge_in_one_call() {
    for path in Path::HOST {
        let coefficients = on_ranks(vec![vec![3.0f32], vec![4.0, 0.0, 0.0]], |group, mut b| {
            let weights = [1.0f32; 2];
            let (weights, mut a) = (gradclip::Tensor::new(&weights), [0.3f32, 0.4]);
            let reports = path.clipper().processes(group).apply_groups(&mut [
                (Clip::agc(0.1), &mut [TensorMut::new(&mut a).parameter(&weights)]),
                (Clip::rms(1.0), &mut [TensorMut::new(&mut b)]),
            ]);
            reports.expect("finite").iter().map(|report| report.clip_coef).collect::<Vec<_>>()
        });
        for of in coefficients {
            // 0.1 of the norm 2 of all parameters, over the norm of all gradients; 1 over the root of 25 by 4 elements.
            let want = [0.2 / 0.5f64.sqrt(), 0.4];
            assert!(of.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{path:?}: {of:?}");
        }
    }
}

#[test]
fn no_groups_are_a_call_all_the_same() {
    for path in Path::HOST {
        let ends = on_ranks(vec![0, 1], |group, rank| {
            let clipper = if rank == 0 { Clipper::cpu() } else { path.clipper() }.processes(group);
            clipper.apply_groups(&mut []).map(|reports| reports.len())
        });
        assert!(ends.iter().all(|end| matches!(end, Ok(0))), "{ends:?}");
    }
}

#[test]
fn groups_of_tensors_merge_in_one_call() {
    for path in Path::HOST {
        let results = on_ranks(vec![3.0f32, 4.0], |group, x| {
            let (mut a, mut b) = ([x], [f32::from(u8::from(x > 3.5)) * 10.0]);
            let clipper = path.clipper().processes(group.clone());
            let clip = |max| Clip::norm(max);
            let reports = clipper
                .apply_groups(&mut [
                    (clip(1.0), &mut [TensorMut::new(&mut a)]),
                    (clip(20.0), &mut [TensorMut::new(&mut b)]),
                ])
                .expect("finite");
            (
                reports[0].total_norm,
                reports[1].total_norm,
                a[0],
                b[0],
                group.calls().load(std::sync::atomic::Ordering::Relaxed),
            )
        });
        for ((first, second, a, b, calls), (want_a, want_b)) in results.into_iter().zip([(0.6, 0.0), (0.8, 10.0)]) {
            assert_norm(first, 5.0, 1e-6, "the first group");
            assert_norm(second, 10.0, 1e-6, "the second group");
            assert!((a - want_a).abs() < 1e-6 && b == want_b && calls == 1);
        }
    }
}

#[test]
fn sums_of_examples_are_clipped_by_the_norm_of_all_slices() {
    for path in Path::HOST {
        let clip = Clip::norm(1.0).eps(0.0).scope(Scope::Example);
        // Two examples, of which each rank holds one element.
        let sums = on_ranks(vec![[3.0f32, 0.1], [4.0, 0.2]], |group, own| {
            let own = gradclip::Tensor::new(&own).shape(&[2, 1]).expect("fits");
            let mut sum = [0f32];
            let clipper = path.clipper().processes(group);
            clipper.sum_examples(&clip, &[own], &mut [TensorMut::new(&mut sum)]).expect("finite");
            sum[0]
        });
        assert!((sums[0] - 0.7).abs() < 1e-6 && (sums[1] - 1.0).abs() < 1e-6, "{path:?}: {sums:?}");
        // One rank's sum is too long, which it finds before it measures.
        let errors = on_ranks(vec![1, 2], |group, len| {
            let own = [3.0f32, 0.1];
            let own = gradclip::Tensor::new(&own).shape(&[2, 1]).expect("fits");
            let mut sum = vec![0f32; len];
            let clipper = path.clipper().processes(group);
            clipper.sum_examples(&clip, &[own], &mut [TensorMut::new(&mut sum)]).expect_err("one is too long")
        });
        let told = matches!(errors[..], [Error::PeerFailed { rank: 1 }, Error::Tensor { .. }]);
        assert!(told, "{path:?}: {errors:?}");
    }
}

#[test]
fn decided_clips_follow_all_ranks() {
    for clip in [Clip::norm(1.0).eps(0.0), Clip::value(0.5)] {
        let pieces = on_ranks(vec![3.0f32, 4.0], |group, x| {
            let decided =
                Clipper::cpu().processes(group).decide(&clip, &[gradclip::Tensor::new(&[x])]).expect("finite");
            let mut piece = [x];
            decided.apply(0, 0, &mut TensorMut::new(&mut piece)).expect("a piece of it");
            (piece[0], decided.report().elements, decided.report().clipped)
        });
        let want = if clip == Clip::value(0.5) { [0.5, 0.5] } else { [0.6, 0.8] };
        assert_eq!(pieces, [(want[0], 2, true), (want[1], 2, true)]);
    }
}

/// Each part is below the limit, and the whole above.
#[test]
fn the_norm_of_all_ranks_skips_the_step_of_each() {
    for path in Path::ALL {
        let set = tensors(*path, &mut Random(6));
        for clip in [Clip::norm(0.5).grad_scale(8.0), Clip::rms(1e-3), Clip::average_norm(1e-6)] {
            let norm = path.clip(&clip, &set).ok().0.total_norm;
            for (limit, skipped) in [(norm * 0.99, Some(Skipped::Above)), (norm * 1.01, None)] {
                let clip = clip.skip_above(limit);
                let parts = dealt(&set, 2);
                let ranks = on_ranks(parts.clone(), |group, own| clip_within(*path, &clip, &group, &own));
                for (done, before) in ranks.into_iter().zip(&parts) {
                    let (report, after) = done.ok();
                    assert_eq!(report.skipped, skipped, "{path:?} {clip}");
                    if skipped.is_some() {
                        assert_same_bits(&after, before, "skipped");
                    } else {
                        assert!(report.clipped, "{path:?} {clip}");
                    }
                }
            }
        }
    }
}

/// The norm of the finite elements is followed, wherever the NaN is.
#[test]
fn a_threshold_follows_beside_a_nan_of_another_rank_under_drop() {
    for path in Path::HOST {
        let clip = Clip::norm(f64::INFINITY).non_finite(NonFinite::Drop);
        let ends = on_ranks(vec![[1.0f32, 0.0], [0.0, f32::NAN]], |group, own| {
            let clipper = path.clipper().processes(group);
            let mut threshold = ZClip::new().warm_up(4);
            let mut last = own;
            for size in [1.0, 2.0, 1.0, 2.0, 1.4e6] {
                last = own.map(|x| x * size);
                clipper.apply_adaptive(&clip, &mut threshold, &mut [TensorMut::new(&mut last)]).expect("dropped");
            }
            (last, threshold)
        });
        assert!(ends[0].0[0] < 3.0 && ends[1].0[1] == 0.0 && ends[0].1 == ends[1].1, "{path:?}: {ends:?}");
    }
}

#[test]
fn running_partials_merge_across_ranks_once() {
    let clip = Clip::norm(1.0).non_finite(NonFinite::Drop);
    let reports = on_ranks(vec![[3.0f32, 0.0], [4.0, f32::NAN]], |group, own| {
        let mut running = NormAccumulator::new(&clip).expect("fits");
        let clipper = Clipper::cpu();
        for x in &own {
            let x = std::slice::from_ref(x);
            clipper.accumulate(&mut running, &[gradclip::Tensor::new(x).named("layer")]).expect("open");
        }
        running.merge_across(&*group).wait().expect("both");
        let again = running.merge_across(&*group).wait().expect_err("merged already");
        assert_says(&again, &["merged across processes"]);
        assert!(clipper.accumulate(&mut running, &[]).is_err());
        let mut own = own;
        clipper.finish(&running, &mut [TensorMut::new(&mut own)]).expect("dropped");
        (running.report().expect("dropped"), own[0])
    });
    for ((report, x), want) in reports.iter().zip([0.6, 0.8]) {
        assert_eq!((report.total_norm, report.elements), (5.0, 4));
        let found = report.non_finite.as_ref().expect("found");
        assert_eq!((found.rank, found.tensor, found.name.as_deref(), found.count), (Some(1), 1, Some("layer"), 1));
        assert!((x - want).abs() < 1e-6);
    }
}

/// The bits do not depend on who is late.
#[test]
fn the_order_of_arrival_changes_no_bit() {
    let mut random = Random(9);
    let set: Vec<_> = (0..7).map(|_| Data::rounded(Dtype::F64, random.normals(1000, 1.0))).collect();
    let clip = Clip::norm(1.0);
    let run = |late: usize| {
        let norms = on_ranks((0..7).collect(), |group, rank: usize| {
            std::thread::sleep(Duration::from_millis(if rank == late { 30 } else { 0 }));
            clip_within(Path::Cpu, &clip, &group, &set[rank..=rank]).ok().0.total_norm.to_bits()
        });
        norms[0]
    };
    let first = run(0);
    assert!((1..7).all(|late| run(late) == first));
}

#[test]
fn what_counts_twice_or_never_is_found() {
    let check = |held: [Vec<(&'static str, bool, usize)>; 3]| {
        let results = on_ranks(held.to_vec(), |group, held| {
            let data = [0f32; 8];
            let of = |(name, counted, len): &(&'static str, bool, usize)| {
                gradclip::Tensor::new(&data[..*len]).named(name).replica(!*counted)
            };
            check_replicas(&*group, &held.iter().map(of).collect::<Vec<_>>()).map_err(|error| error.to_string())
        });
        assert!(results.iter().all(|of| *of == results[0]), "{results:?}");
        results[0].clone()
    };
    assert_eq!(check([vec![("a", true, 4)], vec![("b", true, 3), ("a", false, 4)], vec![("a", false, 4)]]), Ok(()));
    for (held, words) in [
        ([vec![("a", true, 4)], vec![("a", true, 4)], vec![("a", false, 4)]], "counts 2 times"),
        ([vec![("a", false, 4)], vec![], vec![("a", false, 4)]], "no rank counts it"),
        ([vec![("a", true, 4)], vec![("a", false, 5)], vec![]], "different lengths"),
    ] {
        let error = check(held).expect_err("a mistake");
        assert!(error.contains("tensor \"a\"") && error.contains(words), "{error}");
    }
}

#[test]
fn all_or_none_agree() {
    for size in [1, 2, 5] {
        let all = on_ranks(vec![(); size], |group, ()| agree(&*group, true).is_ok());
        assert!(all.into_iter().all(|of| of));
        let bad = size as u32 - 1;
        let errors =
            on_ranks(vec![(); size], |group, ()| agree(&*group, group.rank() != bad).expect_err("one is not well"));
        assert!(errors.iter().all(|error| matches!(error, Error::PeerFailed { rank } if *rank == bad)), "{errors:?}");
    }
    agree(&*thread_group(1, None)[0], true).expect("alone");
}

/// A column is a unit of its own on each rank that holds it.
#[test]
fn a_report_names_what_a_rank_holds() {
    let clip = Clip::norm(1.0).scope(Scope::Unit).unit_axis(UnitAxis::Last);
    let reports: Vec<ClipReport> = on_ranks(vec![1.0f32, 2.0], |group, x| {
        let set = [Data::of(&[x, 2.0 * x, 3.0 * x]).shaped(&[1, 3])];
        clip_within(Path::Cpu, &clip, &group, &set).ok().0
    });
    let norms: Vec<_> = reports[1].segments.iter().map(|segment| segment.norm).collect();
    let root = 5f64.sqrt();
    assert!(norms.iter().zip([root, 2.0 * root, 3.0 * root]).all(|(a, b)| (a - b).abs() < 1e-12), "{norms:?}");
}

/// Ranks that hold parts of the same units, along axes that none of them reduces, share each unit's norm.
#[test]
fn units_along_any_axes_span_ranks() {
    let clip = Clip::norm(1.0).scope(Scope::Unit).unit_axis(UnitAxis::axes(&[0, -1]));
    let whole = Data::of(&[3.0f32, 0.0, 0.0, 2.0, 4.0, 0.0, 0.0, 1.0, 0.0, 5.0, 12.0, 0.0]).shaped(&[2, 3, 2]);
    let part = |of: Range<usize>| {
        let rows = [0, 1].into_iter().flat_map(|i| of.clone().flat_map(move |j| [6 * i + 2 * j, 6 * i + 2 * j + 1]));
        Data::rounded(Dtype::F32, rows.map(|i| whole.get(i))).shaped(&[2, of.len(), 2])
    };
    let reports =
        on_ranks(vec![part(0..1), part(1..3)], |group, own| clip_within(Path::Cpu, &clip, &group, &[own]).ok().0);
    let alone = Path::Cpu.clip(&clip, std::slice::from_ref(&whole)).ok().0;
    assert!(
        alone
            .segments
            .iter()
            .map(|s| (s.index, s.norm))
            .eq([5.0, 2.0, 12.0, 26f64.sqrt()].iter().enumerate().map(|(i, norm)| (Some(i as u64), *norm))),
        "{alone:?}"
    );
    for report in reports {
        for (own, all) in report.segments.iter().zip(&alone.segments) {
            assert_norm(own.norm, all.norm, 1e-12, "a unit");
        }
    }
}

#[cfg(feature = "gpu")]
mod on_the_device {
    use super::*;
    use gradclip::gpu::{GpuPlan, GpuTensor, PlanOptions};

    /// One rank on the CPU, one through the device, one on it.
    #[test]
    fn ranks_may_clip_in_different_places() {
        let set = tensors(Path::GpuHost, &mut Random(5));
        for clip in [Clip::norm(0.5), Clip::rms(1e-3)] {
            let whole = Path::Cpu.clip(&clip, &set);
            let ranks = dealt(&set, 3).into_iter().zip(Path::ALL).collect();
            let ranks =
                on_ranks(ranks, |group, (own, path): (Vec<Data>, &Path)| clip_within(*path, &clip, &group, &own));
            let part = |rank: usize, all: &[Data]| all.iter().skip(rank).step_by(3).cloned().collect::<Vec<_>>();
            for (rank, done) in ranks.iter().enumerate() {
                let report = done.report.as_ref().expect("finite");
                assert_norm(report.total_norm, whole.report.as_ref().expect("finite").total_norm, 1e-6, "the norm");
                for (got, want) in done.after.iter().zip(part(rank, &whole.after)) {
                    assert_close(got, &want, 1e-6, "an element");
                }
            }
        }
    }

    #[test]
    fn running_norms_merge_with_those_of_the_host() {
        let clip = Clip::norm(1.0).non_finite(NonFinite::Drop);
        let reports = on_ranks(vec![0, 1], |group, rank| {
            if rank == 0 {
                let mut running = NormAccumulator::new(&clip).expect("fits");
                let mut own = [3.0f32];
                Clipper::cpu().accumulate(&mut running, &[gradclip::Tensor::new(&own)]).expect("open");
                running.merge_across(&*group).wait().expect("both");
                let report = Clipper::cpu().finish(&running, &mut [TensorMut::new(&mut own)]).expect("dropped");
                return (report, own[0]);
            }
            let gpu = gpu::gpu();
            let buffer = gpu::upload(gpu, bytemuck::cast_slice(&[4.0f32, f32::NAN]));
            let running = gpu.accumulator(&clip).expect("fits");
            let set = running.plan(&[GpuTensor::f32(&buffer, ..).expect("fits").named("w")]).expect("fits");
            let mut encoder = gpu::encoder(gpu);
            set.accumulate(&mut encoder).expect("works");
            gpu.queue().submit([encoder.finish()]);
            gpu::block_on(running.merge_across(&*group)).expect("both");
            let mut encoder = gpu::encoder(gpu);
            running.finish(&mut encoder).expect("works");
            set.scale(&mut encoder).expect("works");
            gpu.queue().submit([encoder.finish()]);
            let bytes = gpu::download(gpu, &buffer);
            (running.report().wait().expect("dropped"), bytemuck::pod_read_unaligned(&bytes[..4]))
        });
        for ((report, x), want) in reports.iter().zip([0.6, 0.8]) {
            assert_norm(report.total_norm, 5.0, 1e-6, "the norm");
            assert_eq!(report.elements, 3);
            let found = report.non_finite.as_ref().expect("found");
            assert_eq!((found.rank, found.name.as_deref(), found.index), (Some(1), Some("w"), 1));
            assert!((x - want).abs() < 1e-6, "{x}");
        }
    }

    /// A threshold on the host follows what has merged, and the plan's next step begins anew.
    #[test]
    fn a_plan_merges_then_adapts_step_after_step() {
        let steps = [[3.0f32, 4.0], [30.0, 40.0], [3.0, 4.0], [6.0, 8.0]];
        let clip = Clip::norm(f64::INFINITY);
        let coefficients = on_ranks(vec![0, 1], |group, rank: usize| {
            let gpu = gpu::gpu();
            let buffer = gpu::upload(gpu, &[0; 4]);
            let plan = gpu.plan(&clip, &[GpuTensor::f32(&buffer, ..).expect("fits")]).expect("fits");
            let mut threshold = AutoClip::new().percentile(50.0).warm_up(1);
            let mut coefficients = Vec::new();
            for step in steps {
                gpu::write(gpu, &buffer, 0, bytemuck::bytes_of(&step[rank]));
                let mut encoder = gpu::encoder(gpu);
                plan.encode_measure(&mut encoder).expect("works");
                gpu.queue().submit([encoder.finish()]);
                plan.merge_across(&*group).wait().expect("both");
                plan.follow(&mut threshold).wait().expect("fits");
                let mut encoder = gpu::encoder(gpu);
                plan.encode_scale(&mut encoder).expect("works");
                gpu.queue().submit([encoder.finish()]);
                let report = plan.report().wait().expect("finite");
                coefficients.push((report.total_norm, report.clip_coef));
            }
            // Alone again.
            gpu::step(gpu, &plan);
            let alone = plan.report().wait().expect("finite").total_norm;
            assert!(alone < coefficients[3].0, "{alone}");
            coefficients
        });
        assert_eq!(coefficients[0], coefficients[1]);
        for ((norm, _), want) in coefficients[0].iter().zip([5.0, 50.0, 5.0, 10.0]) {
            assert_norm(*norm, want, 1e-6, "a step");
        }
        assert!((coefficients[0][1].1 - 27.5 / 50.0).abs() < 1e-6, "{coefficients:?}");
    }

    /// A plan on a rank's one tensor, and what it does in a step.
    struct Ready {
        buffer: wgpu::Buffer,
        plan: GpuPlan,
    }

    impl Ready {
        fn new(clip: &Clip, contents: &[f32]) -> Self {
            let buffer = gpu::upload(gpu::gpu(), bytemuck::cast_slice(contents));
            let plan = gpu::gpu().plan(clip, &[GpuTensor::f32(&buffer, ..).expect("fits").named("w")]).expect("fits");
            Self { buffer, plan }
        }

        fn submit(&self, encode: impl Fn(&GpuPlan, &mut wgpu::CommandEncoder)) {
            let mut encoder = gpu::encoder(gpu::gpu());
            encode(&self.plan, &mut encoder);
            gpu::gpu().queue().submit([encoder.finish()]);
        }

        fn merge(&self, group: &dyn ProcessGroup) {
            self.submit(|plan, encoder| plan.encode_measure(encoder).expect("works"));
            self.plan.merge_across(group).wait().expect("all ranks");
        }

        fn scale(&self) {
            self.submit(|plan, encoder| plan.encode_scale(encoder).expect("works"));
        }
    }

    /// Thresholds that go by the number of elements are those of all ranks where they have merged, and the rank's own where not.
    #[test]
    fn a_step_by_itself_after_one_together() {
        on_ranks(vec![vec![3.0f32], vec![4.0, 0.0, 0.0]], |group, own| {
            let ready = Ready::new(&Clip::rms(1.0), &own);
            for profiled in [false, true] {
                gpu::write(gpu::gpu(), &ready.buffer, 0, bytemuck::cast_slice(&own));
                ready.merge(&*group);
                ready.scale();
                let together = ready.plan.report().wait().expect("finite");
                assert_norm(together.total_norm, 2.5, 1e-6, "of all");
                assert!((together.clip_coef - 0.4).abs() < 1e-6 && together.elements == 4, "{together:?}");

                gpu::write(gpu::gpu(), &ready.buffer, 0, bytemuck::cast_slice(&own));
                if profiled {
                    ready.plan.profile().wait().expect("works");
                } else {
                    gpu::step(gpu::gpu(), &ready.plan);
                }
                let alone = ready.plan.report().wait().expect("finite");
                let norm = f64::from(own[0]) / (own.len() as f64).sqrt();
                assert_norm(alone.total_norm, norm, 1e-6, "of its own");
                assert!((alone.clip_coef - 1.0 / norm).abs() < 1e-6, "{alone:?}");
                assert_eq!(alone.elements, own.len() as u64);
            }
        });
    }

    /// The report is on the step that has run, whatever was recorded since, and on what was measured of all ranks in it.
    #[test]
    fn a_report_is_on_the_step_that_has_run() {
        let clip = Clip::norm(1.0).non_finite(NonFinite::Skip);
        on_ranks(vec![[1.0f32, 2.0], [f32::NAN, 2.0]], |group, own| {
            let ready = Ready::new(&clip, &own);
            ready.merge(&*group);
            ready.scale();
            let mut next = gpu::encoder(gpu::gpu());
            ready.plan.encode(&mut next).expect("works");
            let report = ready.plan.report().wait().expect("skipped");
            let found = report.non_finite.as_ref().expect("on rank 1");
            assert_eq!((found.rank, found.name.as_deref(), found.index), (Some(1), Some("w"), 0));
            assert_eq!((report.has_non_finite(), report.elements), (true, 4));

            gpu::write(gpu::gpu(), &ready.buffer, 0, bytemuck::cast_slice(&[3.0f32, 4.0]));
            gpu::gpu().queue().submit([next.finish()]);
            let report = ready.plan.report().wait().expect("finite");
            assert_norm(report.total_norm, 5.0, 1e-6, "of its own");
            assert_eq!((report.has_non_finite(), report.elements), (false, 2));
        });
    }

    /// What others have measured would count twice.
    #[test]
    fn what_is_on_the_device_merges_once() {
        let clip = Clip::norm(1.0);
        on_ranks(vec![[3.0f32], [4.0]], |group, own| {
            let ready = Ready::new(&clip, &own);
            for _ in 0..2 {
                ready.merge(&*group);
                let again = ready.plan.merge_across(&*group).wait().expect_err("merged already");
                assert_says(&again, &["merged across processes already"]);
            }
            ready.scale();
            assert_norm(ready.plan.report().wait().expect("finite").total_norm, 5.0, 1e-6, "once");

            let gpu = gpu::gpu();
            gpu::write(gpu, &ready.buffer, 0, bytemuck::cast_slice(&own));
            let running = gpu.accumulator(&clip).expect("fits");
            let set = running.plan(&[GpuTensor::f32(&ready.buffer, ..).expect("fits")]).expect("fits");
            for together in [true, true, false] {
                let mut encoder = gpu::encoder(gpu);
                set.accumulate(&mut encoder).expect("works");
                gpu.queue().submit([encoder.finish()]);
                if together {
                    running.merge_across(&*group).wait().expect("both");
                    let again = running.merge_across(&*group).wait().expect_err("merged already");
                    assert_says(&again, &["merged across processes already"]);
                    let more = set.accumulate(&mut gpu::encoder(gpu)).expect_err("merged already");
                    assert_says(&more, &["accepts no more before its finish"]);
                }
                let mut encoder = gpu::encoder(gpu);
                running.finish(&mut encoder).expect("works");
                gpu.queue().submit([encoder.finish()]);
                let report = running.report().wait().expect("finite");
                let (norm, elements) = if together { (5.0, 2) } else { (f64::from(own[0]), 1) };
                assert_norm(report.total_norm, norm, 1e-6, "a running norm");
                assert_eq!(report.elements, elements);
            }
        });
    }

    #[test]
    fn what_cannot_merge_says_so_to_all() {
        let gpu = gpu::gpu();
        let errors = on_ranks(vec![0, 1], |group, rank| {
            let buffer = gpu::upload(gpu, &[0; 8]);
            let tensors = [GpuTensor::f32(&buffer, ..).expect("fits")];
            let measured = |plan: GpuPlan| {
                let mut encoder = gpu::encoder(gpu);
                plan.encode_measure(&mut encoder).expect("works");
                gpu.queue().submit([encoder.finish()]);
                plan
            };
            let clip = Clip::norm(1.0);
            // Nothing submitted, a value clip, a threshold on the device: on rank 1 only.
            let threshold = gradclip::gpu::DeviceThreshold::ZClip(ZClip::new());
            let unfit = [
                gpu.plan(&clip, &tensors).expect("fits"),
                measured(gpu.plan(&Clip::value(1.0), &tensors).expect("fits")),
                measured(
                    gpu.plan_with(&[(clip, &tensors)], PlanOptions::default().threshold(threshold)).expect("fits"),
                ),
            ];
            let fit = measured(gpu.plan(&clip, &tensors).expect("fits"));
            unfit
                .map(|plan| if rank == 1 { plan } else { measured(gpu.plan(&clip, &tensors).expect("fits")) })
                .map(|plan| plan.merge_across(&*group).wait().expect_err("one is unfit"))
                .into_iter()
                .chain([Error::ProcessGroup(format!("{:?}", fit.merge_across(&*group).wait().is_ok()))])
                .collect::<Vec<_>>()
        });
        assert!(matches!(errors[1][..3], [Error::NotSubmitted, Error::Usage(_), Error::Usage(_)]), "{:?}", errors[1]);
        assert!(errors[0][..3].iter().all(|error| matches!(error, Error::PeerFailed { rank: 1 })), "{:?}", errors[0]);
        assert!(errors.iter().all(|of| of[3].to_string().contains("true")), "the next call works: {errors:?}");
    }
}
