//! Guards against a step that depends on how it is cut: into threads or pieces, in which order, at which addresses, and in
//! whose memory the state lies.

use crate::common::numbers::Random;
use crate::common::{Data, assert_same_bits};
use gradclip::processes::thread_group;
use gradclip::{
    AdaGc, Clip, Clipper, Dtype, Halves, NonFinite, Optimizer, OptimizerState, Scope, Tensor, TensorMut, UnitAxis,
};

/// Parameters and gradients: some larger than a task, a scalar, an empty one.
fn set(random: &mut Random) -> (Vec<Data>, Vec<Data>) {
    let shapes: [&[usize]; 6] = [&[150, 1001], &[], &[0, 3], &[33], &[300_000], &[7, 5, 11]];
    let dtypes = [Dtype::F32, Dtype::BF16, Dtype::F64, Dtype::F16, Dtype::F32, Dtype::BF16];
    let data = |random: &mut Random, shift: usize, size: f64| {
        let of = |(i, shape): (usize, &&[usize])| {
            let numbers = random.normals(shape.iter().product(), size);
            Data::rounded(dtypes[(i + shift) % 6], numbers).shaped(shape).named(&format!("w{i}"))
        };
        shapes.iter().enumerate().map(of).collect::<Vec<_>>()
    };
    (data(random, 0, 1.0), data(random, 1, 0.1))
}

fn views(set: &[Data]) -> Vec<Tensor<'_>> {
    set.iter().map(Data::view).collect()
}

/// Each tensor of the state, by parameter.
fn kept(state: &OptimizerState<'_>, optimizer: &Optimizer, set: &[Data]) -> Vec<Vec<u8>> {
    let names = |(i, data): (usize, &Data)| {
        let tensors = optimizer.state_tensors(data.dtype).into_iter();
        tensors.map(|kept| state.bytes(i, kept.name).expect("it is kept").to_vec()).collect::<Vec<_>>()
    };
    set.iter().enumerate().flat_map(names).collect()
}

fn optimizers() -> [Optimizer; 5] {
    [
        Optimizer::sgd(0.1).momentum(0.9).nesterov(true).halves(Halves::Master),
        Optimizer::adagrad(0.1).initial_accumulator_value(0.5),
        Optimizer::rmsprop(0.01).centered(true).momentum(0.5).weight_decay(0.1).halves(Halves::Master),
        Optimizer::adam(0.01).amsgrad(true).maximize(true),
        Optimizer::adamw(0.01).weight_decay(0.1).halves(Halves::Master),
    ]
}

fn clips() -> [Clip; 5] {
    [
        Clip::norm(1.0),
        Clip::value(0.1).grad_scale(2.0),
        Clip::agc(0.01).unit_axis(UnitAxis::Last),
        Clip::norm(0.5).scope(Scope::Unit),
        Clip::rms(0.01).scope(Scope::Tensor).non_finite(NonFinite::Drop),
    ]
}

/// Three steps at once, in pools of different sizes.
#[test]
fn threads_change_no_bit() {
    let threads = |count| rayon::ThreadPoolBuilder::new().num_threads(count).build().expect("threads");
    for (optimizer, clip) in optimizers().into_iter().zip(clips()) {
        let run = |count: usize| {
            let mut random = Random(7);
            let (mut w, _) = set(&mut random);
            let mut state = optimizer.state(&views(&w)).expect("valid settings");
            threads(count).install(|| {
                for _ in 0..3 {
                    let (_, g) = set(&mut random);
                    let mut parameters: Vec<_> = w.iter_mut().map(Data::view_mut).collect();
                    Clipper::cpu().step(&clip, &mut state, &mut parameters, &views(&g)).expect("a valid step");
                }
            });
            let kept = kept(&state, &optimizer, &w);
            (w, kept)
        };
        let (one, three) = (run(1), run(3));
        assert_same_bits(&one.0, &three.0, &optimizer.to_string());
        assert!(one.1 == three.1, "{optimizer}: the state");
    }
}

/// In pieces at odd addresses, in any order and from several threads, with the state in the caller's memory; and whole,
/// with the state in memory that the caller lends.
#[test]
fn pieces_and_lent_memory_give_the_same_bits() {
    for (optimizer, clip) in optimizers().into_iter().zip(clips()) {
        let mut random = Random(11);
        let (start, _) = set(&mut random);
        let mut own = optimizer.state(&views(&start)).expect("valid settings");
        let group = [(optimizer, &views(&start)[..])];
        let mut cut = OptimizerState::elsewhere(&group).expect("valid settings");
        // A byte before each, so that nothing is aligned.
        let sizes = |data: &Data| {
            optimizer
                .state_tensors(data.dtype)
                .iter()
                .map(|kept| 1 + data.len() * kept.element_size)
                .collect::<Vec<_>>()
        };
        let zeros: Vec<Vec<Vec<u8>>> =
            start.iter().map(|data| sizes(data).into_iter().map(|size| vec![0; size]).collect()).collect();
        let mut memories = [zeros.clone(), zeros];
        for memory in &mut memories {
            let lent = memory.iter_mut().map(|all| all.iter_mut().map(|one| &mut one[1..]).collect()).collect();
            OptimizerState::over(&group, lent).expect("it fits").restart(&views(&start)).expect("these are they");
        }
        let [pieces, lent] = &mut memories;
        let (mut whole, mut in_pieces, mut over) = (start.clone(), start.clone(), start.clone());
        for step in 0..3 {
            let (_, g) = set(&mut random);
            let with_parameter =
                |set: &[Data]| g.iter().zip(set).map(|(g, w)| g.clone().with_parameter(w.clone())).collect::<Vec<_>>();
            let decided = {
                let g = with_parameter(&in_pieces);
                let parameters: Vec<_> = g.iter().map(|g| g.parameter.as_ref().expect("it has one").view()).collect();
                let g: Vec<_> = g.iter().zip(&parameters).map(|(g, w)| g.view().parameter(w)).collect();
                Clipper::cpu().decide(&clip, &g).expect("a valid clip")
            };
            let decided = cut.decided(vec![decided]).expect("it fits");

            let mut parameters: Vec<_> = whole.iter_mut().map(Data::view_mut).collect();
            let report = Clipper::cpu().step(&clip, &mut own, &mut parameters, &views(&g)).expect("a valid step");

            {
                let views_of_state = lent.iter_mut().map(|all| all.iter_mut().map(|one| &mut one[1..]).collect());
                let mut state = OptimizerState::over(&group, views_of_state.collect()).expect("it fits");
                state.set_steps(step);
                let mut parameters: Vec<_> = over.iter_mut().map(Data::view_mut).collect();
                Clipper::cpu().step(&clip, &mut state, &mut parameters, &views(&g)).expect("a valid step");
            }

            // Each piece with copies of its elements, from two threads by turns and from the last to the first.
            for (i, data) in in_pieces.iter_mut().enumerate().rev() {
                let (len, size) = (data.len(), data.dtype.size());
                let mut cuts = vec![0, len];
                cuts.extend((0..4).map(|_| random.below(len + 1)));
                cuts.sort_unstable();
                let mut rests: Vec<_> = pieces[i].iter_mut().map(|one| &mut one[1..]).collect();
                let mut rest = &mut data.bytes[..];
                let mut jobs = Vec::new();
                for cut in cuts.windows(2) {
                    let n = cut[1] - cut[0];
                    let (own, others) = std::mem::take(&mut rest).split_at_mut(n * size);
                    rest = others;
                    let mut state = Vec::new();
                    for (rest, kept) in rests.iter_mut().zip(optimizer.state_tensors(data.dtype)) {
                        let (own, others) = std::mem::take(rest).split_at_mut(n * kept.element_size);
                        state.push(own);
                        *rest = others;
                    }
                    jobs.push((cut[0], own, state));
                }
                let (dtype, gradient) = (data.dtype, &g[i]);
                let decided = &decided;
                std::thread::scope(|scope| {
                    for (first, own, state) in jobs.into_iter().rev() {
                        scope.spawn(move || {
                            let n = own.len() / size;
                            let bytes = first * gradient.dtype.size()..(first + n) * gradient.dtype.size();
                            let gradient =
                                Tensor::from_bytes(gradient.dtype, &gradient.bytes[bytes]).expect("whole elements");
                            let mut own = TensorMut::from_bytes(dtype, own).expect("whole elements");
                            decided.apply(i, first as u64, &mut own, &gradient, state).expect("it fits");
                        });
                    }
                });
            }
            assert_eq!(format!("{:?}", decided.reports()), format!("{:?}", [report]), "{optimizer}");
            assert_same_bits(&whole, &in_pieces, &format!("{optimizer}, {clip}, in pieces"));
            assert_same_bits(&whole, &over, &format!("{optimizer}, {clip}, over lent memory"));
        }
        let expected = kept(&own, &optimizer, &start);
        for memory in [pieces, lent] {
            let kept: Vec<_> = memory.iter().flatten().map(|one| one[1..].to_vec()).collect();
            assert!(kept == expected, "{optimizer}: the state");
        }
        assert_eq!((own.steps(), cut.steps()), (3, 3));
    }
}

/// Ranks that hold a part each step by the norm of all, and all of them skip or none.
#[test]
fn ranks_step_as_one_process_does() {
    let sgd = Optimizer::sgd(0.5).momentum(0.9);
    let clip = Clip::norm(1.0).non_finite(NonFinite::Skip);
    let steps = [[3.0f32, 4.0], [f32::NAN, 1.0], [0.25, 0.5]];
    let run = move |clipper: Clipper, own: std::ops::Range<usize>| {
        let mut w = vec![vec![1.0f32; 3]; own.len()];
        let start: Vec<_> = w.iter().map(|w| Tensor::new(w)).collect();
        let mut state = sgd.state(&start).expect("valid settings");
        for gradients in steps {
            let gradients: Vec<_> = gradients[own.clone()].iter().map(|x| [*x; 3]).collect();
            let gradients: Vec<_> = gradients.iter().map(|g| Tensor::new(g)).collect();
            let mut w: Vec<_> = w.iter_mut().map(|w| TensorMut::new(w)).collect();
            clipper.step(&clip, &mut state, &mut w, &gradients).expect("a valid step");
        }
        assert_eq!(state.steps(), 2);
        w
    };
    let alone = run(Clipper::cpu(), 0..2);
    let ranks = thread_group(2, None).into_iter().enumerate();
    let threads: Vec<_> = ranks
        .map(|(rank, group)| std::thread::spawn(move || run(Clipper::cpu().processes(group), rank..rank + 1)))
        .collect();
    let together: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect();
    assert_eq!(alone, together);
}

/// A rank whose tensors do not fit fails, and so do the others.
#[test]
fn a_rank_that_fails_changes_nothing_anywhere() {
    let threads: Vec<_> = thread_group(2, None)
        .into_iter()
        .map(|group| {
            std::thread::spawn(move || {
                let (mut w, g) = ([1.0f32; 2], [1.0f32; 3]);
                let mut state = Optimizer::sgd(0.1).state(&[Tensor::new(&w)]).expect("valid settings");
                let own = if group.rank() == 0 { &g[..] } else { &g[..2] };
                let (clipper, clip) = (Clipper::cpu().processes(group), Clip::norm(1.0));
                let done = clipper.step(&clip, &mut state, &mut [TensorMut::new(&mut w)], &[Tensor::new(own)]);
                assert_eq!((w, state.steps()), ([1.0; 2], 0));
                done.expect_err("one has failed").to_string()
            })
        })
        .collect();
    let errors: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
    assert!(errors[0].contains("that of its parameter is [2]"), "{errors:?}");
    assert!(errors[1].contains("rank 0"), "{errors:?}");
}

/// A skipped step changes nothing, whichever way it is taken.
#[test]
fn a_skipped_step_changes_no_bit_and_does_not_count() {
    let mut w = [1.0f32, 2.0];
    let mut state = Optimizer::adamw(0.1).state(&[Tensor::new(&w)]).expect("valid settings");
    for (clip, g) in [
        (Clip::norm(1.0).non_finite(NonFinite::Skip), [f32::NAN, 1.0]),
        (Clip::value(1.0).non_finite(NonFinite::Skip), [1.0, f32::INFINITY]),
        (Clip::norm(1.0).skip_above(10.0), [8.0, 9.0]),
    ] {
        let report = Clipper::cpu().step(&clip, &mut state, &mut [TensorMut::new(&mut w)], &[Tensor::new(&g)]);
        assert!(report.expect("a valid step").skipped.is_some(), "{clip}");
        let decided = Clipper::cpu().decide(&clip, &[Tensor::new(&g)]).expect("a valid clip");
        let step = state.decided(vec![decided]).expect("it fits");
        assert!(step.is_skipped());
        step.apply_all(&mut state, &mut [TensorMut::new(&mut w)], &[Tensor::new(&g)]).expect("it fits");
        assert_eq!((w, state.steps()), ([1.0, 2.0], 0), "{clip}");
        assert!(["exp_avg", "exp_avg_sq"].iter().all(|name| state.bytes(0, name) == Some(&[0; 8])), "{clip}");
    }
}

/// A threshold that follows the norms decides as it does for a clip alone.
#[test]
fn adaptive_thresholds_and_groups_of_clips() {
    let (mut random, clipper) = (Random(5), Clipper::cpu());
    let sgd = Optimizer::sgd(1.0);
    let (mut own, mut with_step) = (AdaGc::new().warm_up(2), AdaGc::new().warm_up(2));
    for _ in 0..6 {
        let g: Vec<Vec<f32>> = (0..2).map(|_| random.normals(20, 1.0).iter().map(|x| *x as f32).collect()).collect();
        let views: Vec<_> = g.iter().map(|g| Tensor::new(g)).collect();
        let clip = Clip::norm(2.0).scope(Scope::Tensor);
        let mut clipped = g.clone();
        let mut tensors: Vec<_> = clipped.iter_mut().map(|g| TensorMut::new(g)).collect();
        let expected = clipper.apply_adaptive(&clip, &mut own, &mut tensors).expect("a valid clip");
        let mut w = vec![vec![0f32; 20]; 2];
        let mut state = {
            let zeros: Vec<_> = w.iter().map(|w| Tensor::new(w)).collect();
            sgd.state(&zeros).expect("valid settings")
        };
        let mut parameters: Vec<_> = w.iter_mut().map(|w| TensorMut::new(w)).collect();
        let report = clipper.step_adaptive(&clip, &mut with_step, &mut state, &mut parameters, &views).expect("valid");
        assert_eq!(report.segments, expected.segments);
        assert!(w.iter().flatten().zip(clipped.iter().flatten()).all(|(w, g)| *w == -g));
    }
    // Each group by its own norm.
    let (mut a, mut b, one) = ([0f32], [0f32], [4.0f32]);
    let mut state = {
        let (first, second) = ([Tensor::new(&a)], [Tensor::new(&b)]);
        OptimizerState::new(&[(sgd, &first), (sgd.lr(0.5), &second)]).expect("valid settings")
    };
    let clips = [Clip::norm(1.0).eps(0.0), Clip::norm(2.0).eps(0.0)];
    let (parameters, gradients) = (&mut [TensorMut::new(&mut a), TensorMut::new(&mut b)], [Tensor::new(&one); 2]);
    let reports = clipper.step_groups(&clips, &mut state, parameters, &gradients).expect("a valid step");
    assert_eq!(reports.iter().map(|report| report.clip_coef).collect::<Vec<_>>(), [0.25, 0.5]);
    assert_eq!((a, b), ([-1.0], [-1.0]));
}
