//! The device's arithmetic is judged rightly: what `probe` finds out of few values holds for all.

use half::f16;

use super::super::device::{GpuDevice, adapter};
use super::super::tuning::Tuning;
use super::*;
use crate::wait::block_on;

fn device() -> GpuDevice {
    let opened = block_on(async { GpuDevice::open(&adapter(None).await?).await });
    opened.expect("these tests need a device, which may be a software one")
}

/// Every finite float16, itself and brought to a halfway case, and the float32s at and beside each halfway case, with
/// both signs.
fn all() -> Vec<Asked> {
    let mut all = Vec::new();
    for half in 0..f16::INFINITY.to_bits() {
        let next = (half + 1).min(f16::MAX.to_bits());
        let [low, high] = [half, next].map(|half| f16::from_bits(half).to_f32());
        let between = f32::midpoint(low, high);
        for float in [between.next_down().max(low), between, between.next_up().min(high)] {
            all.push(Asked::new([half, half | 0x8000], [float, -float], between));
        }
    }
    all
}

/// A device that passes the probe converts every float16 and every halfway case rightly.
#[test]
fn the_few_values_stand_for_all() {
    let device = device();
    let asked = all();
    let of = |native| block_on(answers(&device, &asked, native));
    let right = |answered: &[Answered]| asked.iter().zip(answered).filter(|(a, b)| are_conversions(a, b)).count();
    if device.native.halves {
        assert_eq!(right(&of(true).expect("it runs")), asked.len());
    } else if let Ok(answered) = of(true) {
        assert!(right(&answered) < asked.len(), "the probe refuses conversions that are right");
    }
    // In integers they are right on any device.
    assert_eq!(right(&of(false).expect("it runs")), asked.len());
}

/// A device that rounds another way, or flushes what it should not, is found out.
#[test]
fn other_roundings_are_found() {
    let asked = boundaries();
    assert!((300..3000).contains(&asked.len()), "{}", asked.len());
    let native = |narrow: fn(f32) -> f16, widen: fn(f16) -> f32, multiply: fn(f32, f32) -> f32| {
        let answer = |asked: &Asked| Answered {
            floats: asked.halves.map(|half| widen(f16::from_bits(half))),
            multiplied: asked.halves.map(|half| narrow(f16::from_bits(half).to_f32() * asked.factor).to_bits()),
            halves: asked.floats.map(|float| narrow(float).to_bits()),
            product: multiply(asked.floats[0], asked.floats[1]),
        };
        Native::of(&asked, &asked.iter().map(answer).collect::<Vec<_>>())
    };
    let toward_zero = |x: f32| {
        let nearest = f16::from_f32(x);
        if nearest.to_f32().abs() > x.abs() { f16::from_bits(nearest.to_bits() - 1) } else { nearest }
    };
    let ties_away = |x: f32| f16::from_f32(if x == 0.0 { x } else { f32::from_bits(x.to_bits() + 1) });
    let flushed = |x: f16| if x.is_normal() { x.to_f32() } else { 0f32.copysign(x.to_f32()) };
    let flushing = |x: f32| {
        let nearest = f16::from_f32(x);
        if nearest.is_normal() { nearest } else { f16::from_f32(0f32.copysign(x)) }
    };
    let unsigned = |x: f32| if f16::from_f32(x) == f16::ZERO { f16::ZERO } else { f16::from_f32(x) };
    let product = |a: f32, b: f32| a * b;
    let truncated = |a: f32, b: f32| {
        let (exact, nearest) = (f64::from(a) * f64::from(b), a * b);
        if f64::from(nearest).abs() > exact.abs() { f32::from_bits(nearest.to_bits() - 1) } else { nearest }
    };
    let away = |a: f32, b: f32| (f64::from(a) * f64::from(b) * (1.0 + 1e-12)) as f32;
    let all = Native { products: true, halves: true };
    assert_eq!(native(f16::from_f32, f16::to_f32, product), all);
    for narrow in [toward_zero, ties_away, flushing, unsigned] {
        assert_eq!(native(narrow, f16::to_f32, product), Native { halves: false, ..all });
    }
    assert_eq!(native(f16::from_f32, flushed, product), Native { halves: false, ..all });
    for multiply in [truncated, away] {
        assert_eq!(native(f16::from_f32, f16::to_f32, multiply), Native { products: false, ..all });
    }
}

/// A device that makes one operation of a product and its rounding is found out.
#[test]
fn products_that_are_rounded_once_are_found() {
    let asked = boundaries();
    let fused = |half: u16, factor: f32| {
        let exact = f64::from(f16::from_bits(half).to_f32()) * f64::from(factor);
        let near = exact as f32;
        let toward_zero = if f64::from(near).abs() > exact.abs() { near.to_bits() - 1 } else { near.to_bits() };
        // An odd last bit stands for what is cut off, so that this is no rounding of its own.
        f16::from_f32(f32::from_bits(toward_zero | u32::from(f64::from(near) != exact))).to_bits()
    };
    let answer = |asked: &Asked| Answered {
        floats: asked.halves.map(|half| f16::from_bits(half).to_f32()),
        multiplied: asked.halves.map(|half| fused(half, asked.factor)),
        halves: asked.floats.map(|float| f16::from_f32(float).to_bits()),
        product: asked.floats[0] * asked.floats[1],
    };
    let native = Native::of(&asked, &asked.iter().map(answer).collect::<Vec<_>>());
    assert_eq!(native, Native { products: true, halves: false });
}

/// What a device cannot do is not left to it, whatever a tuning says.
#[test]
fn a_tuning_cannot_ask_for_what_is_wrong() {
    let mut device = device();
    device.native = Native { products: false, halves: false };
    let clipper = super::super::GpuClipper::on(device).expect("it suffices");
    let Tuning { native_products, native_halves, .. } = clipper.tuning;
    assert!(!native_products && !native_halves);
}
