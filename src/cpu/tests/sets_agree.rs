//! Checks that all instruction sets of this CPU compute the same bits, at every length and alignment, and that half
//! precision is converted and rounded exactly.

use half::{bf16, f16};

use super::super::element::Widen;
use super::super::isa::{self, Isa, Kernel, LANES, Set, run};
use super::super::lost::{lost, lost_by_segment};
use super::super::step::{How, Piece, step_piece};
use super::super::{clamp, columns, count, norm, scale, sum};
use crate::decision::Outcome;
use crate::dtype::with_element;
use crate::magnitude::Magnitude;
use crate::partial::{Location, Partial};
use crate::report::LostElements;
use crate::segment::{By, SegmentLayout, Segments};
use crate::{Clip, Dtype, Halves, NonFinite, NormType, Optimizer, Tensor};

const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16];
const AT: Location = Location { tensor: 3, index: 1000 };

/// Any bits. Many are subnormal, zero, infinite or NaN.
fn bytes(len: usize, seed: usize) -> Vec<u8> {
    let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Elements of ordinary size.
fn ordinary(dtype: Dtype, len: usize, seed: usize) -> Vec<u8> {
    let numbers = bytes(4 * len, seed)
        .chunks_exact(4)
        .map(|b| f32::from(i16::from_ne_bytes([b[0], b[1]])) / 4096.0)
        .collect::<Vec<_>>();
    match dtype {
        Dtype::F32 => numbers.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        Dtype::F64 => numbers.iter().flat_map(|x| (f64::from(*x) * 1.000_000_1).to_ne_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_ne_bytes()).collect(),
        Dtype::BF16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_ne_bytes()).collect(),
    }
}

/// Checks that `f` gives the same on each set.
fn on_each_set<R: PartialEq + std::fmt::Debug>(what: &str, f: impl Fn() -> R) {
    let mut results = Set::all().map(|(name, set)| (name, isa::on(set, &f)));
    let (first, expected) = results.next().expect("the portable set is always there");
    for (name, result) in results {
        assert!(result == expected, "{what}: {name} gave {result:?}, {first} {expected:?}");
    }
}

fn bits(partial: &Partial) -> impl PartialEq + std::fmt::Debug + use<> {
    let Partial { sum, exponent, max, non_finite, nan, first, outside } = *partial;
    (sum.to_bits(), exponent, max.to_bits(), non_finite, nan, first, outside)
}

fn norm_types() -> [NormType; 7] {
    [1.0, 2.0, f64::INFINITY, 3.0, 0.5, 1.5, 40.0].map(NormType::p)
}

/// A buffer with the elements `shift` bytes after an aligned address.
fn shifted(data: &[u8], shift: usize) -> (Vec<u64>, std::ops::Range<usize>) {
    let mut aligned = vec![0u64; data.len() / 8 + 2];
    bytemuck::cast_slice_mut(&mut aligned)[shift..shift + data.len()].copy_from_slice(data);
    (aligned, shift..shift + data.len())
}

/// Calls `f` with elements of every dtype, at every length from 1 to 130 and every alignment, ordinary and any.
fn everywhere(f: impl Fn(Dtype, &[u8], &str)) {
    for dtype in DTYPES {
        for len in 1..=130 {
            let shift = len % 8;
            for (kind, data) in [("ordinary", ordinary(dtype, len, len)), ("any", bytes(len * dtype.size(), len))] {
                let (store, range) = shifted(&data, shift);
                f(dtype, &bytemuck::cast_slice(&store)[range], &format!("{len} {kind} {dtype} at {shift}"));
            }
        }
    }
}

#[test]
fn norms_agree() {
    everywhere(|dtype, data, what| {
        for norm_type in norm_types() {
            on_each_set(&format!("{norm_type:?} of {what}"), || {
                let mut slot = [Partial::EMPTY];
                with_element!(dtype, T => norm::norms::<T>(norm_type, AT, data, data.len() / size_of::<T>(), &mut slot));
                bits(&slot[0])
            });
        }
        on_each_set(&format!("counts of {what}"), || with_element!(dtype, T => count::count::<T>(data)));
    });
}

#[test]
fn norms_of_columns_agree() {
    for dtype in DTYPES {
        for (rows, width, stride) in [(1, 1, 1), (3, 17, 20), (4, 16, 16), (9, 33, 40), (8, 64, 64), (130, 5, 5)] {
            let len = (rows - 1) * stride + width;
            for data in [ordinary(dtype, len, rows), bytes(len * dtype.size(), rows)] {
                for norm_type in norm_types() {
                    on_each_set(&format!("{norm_type:?} of {rows} x {width} {dtype}"), || {
                        let mut slots = vec![Partial::EMPTY; width];
                        with_element!(dtype, T => columns::norms::<T>(norm_type, AT, &data, stride, &mut slots));
                        slots.iter().map(bits).collect::<Vec<_>>()
                    });
                }
            }
        }
    }
}

fn outcomes(factor: f64, count: usize) -> Vec<Outcome> {
    let clip = Clip::norm(1.0);
    let outcome = clip.outcome(clip.known(&Partial { sum: 4.0, ..Partial::EMPTY }), Magnitude::plain(1.0), 1.0, false);
    (0..count).map(|i| Outcome { factor: factor / (i + 1) as f64, ..outcome }).collect()
}

/// The elements that became 0 or infinite, counted one by one. Subnormal ones count in float16 only.
fn lost_between(dtype: Dtype, before: &[u8], after: &[u8]) -> LostElements {
    #[allow(clippy::useless_conversion, reason = "one of the types is f64")]
    let numbers = |bytes: &[u8]| -> Vec<f64> {
        with_element!(dtype, T => bytes.chunks(dtype.size()).map(|x| f64::from(bytemuck::pod_read_unaligned::<T>(x))).collect())
    };
    let least = match dtype {
        Dtype::F64 => f64::MIN_POSITIVE,
        Dtype::F16 => 2f64.powi(-24),
        Dtype::F32 | Dtype::BF16 => f64::from(f32::MIN_POSITIVE),
    };
    let mut lost = LostElements::default();
    for (x, y) in numbers(before).into_iter().zip(numbers(after)).filter(|(x, _)| x.is_finite()) {
        lost.zero += u64::from(x.abs() >= least && y == 0.0);
        lost.infinite += u64::from(y.is_infinite());
    }
    lost
}

#[test]
fn scaling_agrees() {
    everywhere(|dtype, data, what| {
        // The last two are no normal float32. Which payload of two NaNs stays is not promised.
        for factor in [0.37, 0.0, f64::NAN, 6e-5, 7.0, 1e-42, 1e300]
            .into_iter()
            .filter(|f| !f.is_nan() || what.contains("ordinary"))
        {
            for drop in [false, true] {
                for (by, columns) in [(By::Whole, 1), (By::Rows, 7), (By::Columns, 19)] {
                    let layout = SegmentLayout { by, columns, segment: 0, first: 0 };
                    let outcomes = outcomes(factor, if by == By::Rows { 20 } else { columns as usize });
                    on_each_set(&format!("{what} times {factor:e} by {by:?}, drop {drop}"), || {
                        let mut after = data.to_vec();
                        let lost = with_element!(dtype, T => lost_by_segment::<T>(&outcomes, layout, 0, data));
                        with_element!(dtype, T => scale::scale::<T>(&outcomes, layout, 0, drop, &mut after));
                        if factor > 0.0 {
                            assert_eq!(lost, lost_between(dtype, data, &after), "{what} times {factor:e} by {by:?}");
                        }
                        (after, lost)
                    });
                }
            }
        }
    });
}

#[test]
fn clamping_agrees() {
    let inf = f64::INFINITY;
    everywhere(|dtype, data, what| {
        for (min, max) in [(-0.5, 0.25), (0.0, 0.0), (-0.0, inf), (1.0, 2.0), (-inf, inf)] {
            for grad_scale in [1.0, 3.0, 1e-40] {
                for policy in [NonFinite::Propagate, NonFinite::Drop] {
                    let clip = Clip::range(min, max).non_finite(policy);
                    let clip = clip.grad_scale(grad_scale);
                    on_each_set(&format!("{what} to {min}..={max} / {grad_scale:e}, {policy:?}"), || {
                        let (before, mut data) = (data, data.to_vec());
                        let tensor = Tensor::from_bytes(dtype, before).expect("whole elements");
                        let segments = Segments::new(&clip, [tensor.spec].into_iter()).expect("a valid clip");
                        let lost = lost(&clip, 0, dtype, (&segments.layouts[0], &outcomes(1.0, 1)), before);
                        let scan = with_element!(dtype, T => clamp::scan::<T>(&clip, AT, &data));
                        let partial = with_element!(dtype, T => clamp::clamp::<T>(&clip, AT, &mut data));
                        if (min, max) == (-inf, inf) {
                            assert_eq!(lost, lost_between(dtype, before, &data), "{what} / {grad_scale:e}");
                        }
                        (bits(&scan), bits(&partial), data, lost)
                    });
                }
            }
        }
    });
}

#[test]
fn steps_agree() {
    let adam = Optimizer::adamw(0.01).weight_decay(0.1);
    let optimizers = [
        Optimizer::sgd(0.1),
        Optimizer::sgd(0.1).momentum(0.9).nesterov(true).weight_decay(0.1),
        Optimizer::adagrad(0.1),
        Optimizer::rmsprop(0.1).momentum(0.5).centered(true).halves(Halves::Remainder),
        adam.halves(Halves::Remainder),
        adam.betas(0.3, 0.4).amsgrad(true).maximize(true).halves(Halves::Master),
    ];
    let layout = Segments::new(&Clip::norm(1.0), [Tensor::new(&[0f32; 130]).spec].into_iter())
        .expect("a valid clip")
        .layouts
        .remove(0);
    everywhere(|dtype, data, what| {
        // Payloads of NaNs that meet are not promised.
        let len = data.len() / dtype.size();
        if what.contains("any") || len % 7 != 3 {
            return;
        }
        for parameter in DTYPES {
            for optimizer in &optimizers {
                for factor in [0.37, 1e-42] {
                    on_each_set(&format!("{optimizer} of {parameter} by {what} times {factor:e}"), || {
                        let mut own = ordinary(parameter, len, len + 1);
                        let slots =
                            optimizer.slots(parameter).map(|slot| slot.map_or(0, |slot| slot.element_size * len));
                        let mut state = slots.map(|size| vec![0; size]);
                        let clip = Clip::norm(1.0);
                        for t in 1..=3 {
                            let numbers = optimizer.numbers(t);
                            let outcomes = outcomes(factor, 1);
                            let how = How { clip: &clip, matrices: &layout, outcomes: &outcomes, numbers: &numbers };
                            let state = state.each_mut().map(|tensor| &mut tensor[..]);
                            let piece = Piece { parameter: (parameter, &mut own), gradient: (dtype, data), state };
                            step_piece(how, Location { tensor: 0, index: 0 }, piece);
                        }
                        (own, state)
                    });
                }
            }
        }
    });
}

#[test]
fn one_element_is_clamped_to_any_bounds() {
    let bounds = [(-1.0, 1.0), (1.0, 1.0), (-1.0, -1.0), (-0.0, 0.0), (0.0, 0.0), (-0.5, 2.0), (-2.0, f64::INFINITY)];
    let numbers = [0.0, 0.5, 1.0, 1.5, 4.0, f64::INFINITY, f64::NAN];
    for (dtype, (min, max)) in DTYPES.into_iter().flat_map(|dtype| bounds.map(|bounds| (dtype, bounds))) {
        for x in numbers.into_iter().flat_map(|x| [x, -x]) {
            on_each_set(&format!("{x} in {dtype} to {min}..{max}"), || {
                with_element!(dtype, T => {
                    let stored = <T as Widen>::round(x);
                    let mut element = bytemuck::bytes_of(&stored).to_vec();
                    let found = clamp::clamp::<T>(&Clip::range(min, max), AT, &mut element);
                    assert_eq!(found.outside, x < min || x > max, "{x} in {dtype} to {min}..{max}");
                    assert_eq!(found.non_finite, u64::from(!x.is_finite()), "{x} in {dtype} to {min}..{max}");
                    let kept = if found.outside { <T as Widen>::round(x.clamp(min, max)) } else { stored };
                    assert_eq!(element, bytemuck::bytes_of(&kept), "{x} in {dtype} to {min}..{max}");
                });
            });
        }
    }
}

#[test]
fn sums_of_examples_agree() {
    for dtype in DTYPES {
        for columns in [1, 15, 16, 40] {
            let data = ordinary(dtype, 5 * columns, columns);
            on_each_set(&format!("5 x {columns} {dtype}"), || {
                let mut sums = vec![0u8; columns * if dtype == Dtype::F64 { 8 } else { 4 }];
                with_element!(dtype, T => sum::sum::<T>(&outcomes(0.3, 5), false, &data, columns, 0, &mut sums));
                sums
            });
        }
    }
}

/// Converts float32 to halves and halves to float32.
struct Convert<'a> {
    floats: &'a [[f32; LANES]],
    /// float16 and bfloat16.
    halves: [Vec<[u16; LANES]>; 2],
    /// The float32 of every half value, in order.
    widened: [Vec<[f32; LANES]>; 2],
}

impl Kernel for &mut Convert<'_> {
    type Output = ();
    #[inline(always)]
    fn on<I: Isa>(self, isa: I) {
        for floats in self.floats {
            self.halves[0].push(isa.narrow_f16(isa.f(*floats)));
            self.halves[1].push(isa.narrow_bf16(isa.f(*floats)));
        }
        for first in (0..=u16::MAX).step_by(LANES) {
            let group = std::array::from_fn(|i| first + i as u16);
            self.widened[0].push(isa.floats(isa.widen_f16(group)));
            self.widened[1].push(isa.floats(isa.widen_bf16(group)));
        }
    }
}

/// Rounds, in float64 arithmetic, to a type of `fraction` bits whose smallest exponent is `smallest`.
fn nearest_even(x: f32, fraction: i32, smallest: i32, max: f64) -> f64 {
    let x = f64::from(x);
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.abs().to_bits() >> 52) as i32 - 1023).max(smallest);
    let ulp = 2f64.powi(exponent - fraction);
    let rounded = (x / ulp).round_ties_even() * ulp;
    if rounded.abs() > max { f64::INFINITY.copysign(x) } else { rounded }
}

/// Every half value, and the float32 values at, just below and just above the midpoint to the next one.
fn around_every_half() -> Vec<f32> {
    let mut values = vec![65519.0, 65519.996, 65520.0, 65536.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45];
    for to_f32 in [|b| f16::from_bits(b).to_f32(), |b| bf16::from_bits(b).to_f32()] {
        let to_f32: fn(u16) -> f32 = to_f32;
        for bits in 0..=u16::MAX {
            let (x, next) = (to_f32(bits), to_f32(bits.wrapping_add(1)));
            values.push(x);
            if x.is_finite() && next.is_finite() {
                let middle = ((f64::from(x) + f64::from(next)) / 2.0) as f32;
                values.extend([middle, middle.next_down(), middle.next_up()]);
            }
        }
    }
    values.extend([f32::from_bits(0x7f80_0001), f32::from_bits(0xffc1_2345), f32::INFINITY]);
    values.resize(values.len().next_multiple_of(LANES), 0.0);
    values
}

#[test]
fn halves_are_widened_exactly_and_rounded_to_nearest_even() {
    let floats = around_every_half();
    let floats = floats.as_chunks::<LANES>().0;
    for (name, set) in Set::all() {
        let mut convert = Convert { floats, halves: Default::default(), widened: Default::default() };
        isa::on(set, || run(&mut convert));
        for (i, x) in floats.as_flattened().iter().enumerate() {
            let [f, b] = [0, 1].map(|kind| convert.halves[kind].as_flattened()[i]);
            let (f, b) = (f16::from_bits(f), bf16::from_bits(b));
            if x.is_nan() {
                // Quiet, with the sign and the upper payload.
                let upper = |bits: u32, quiet: u32| (x.to_bits() >> bits | quiet) as u16;
                assert_eq!(b.to_bits(), upper(16, 0x40), "{name}: {x:?}");
                let sign = (x.to_bits() >> 16 & 0x8000) as u16;
                assert_eq!(f.to_bits(), sign | 0x7e00 | upper(13, 0) & 0x3ff, "{name}: {x:?}");
                continue;
            }
            assert_eq!(f.to_f64(), nearest_even(*x, 10, -14, 65504.0), "{name}: {x:e} as float16");
            assert_eq!(b.to_f64(), nearest_even(*x, 7, -126, bf16::MAX.to_f64()), "{name}: {x:e} as bfloat16");
            assert_eq!([f.is_sign_negative(), b.is_sign_negative()], [x.is_sign_negative(); 2], "{name}: {x:e}");
        }
        for bits in 0..=u16::MAX {
            let [f, b] = [0, 1].map(|kind| convert.widened[kind].as_flattened()[usize::from(bits)]);
            assert_eq!(b.to_bits(), u32::from(bits) << 16, "{name}: bfloat16 {bits:x}");
            let (want, nan) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits).is_nan());
            let payload = u32::from(bits & 0x8000) << 16 | 0x7fc0_0000 | u32::from(bits & 0x3ff) << 13;
            assert_eq!(f.to_bits(), if nan { payload } else { want.to_bits() }, "{name}: float16 {bits:x}");
        }
    }
}
