//! What kernels may leave to the device's own arithmetic.
//!
//! WGSL lets products and conversions round up or down. Every device seen rounds to the nearest, ties to even, but none
//! promises it. So a kernel with the very functions that clips use (`shaders/probe.wgsl`) runs once when a device is
//! opened, on values beside and at the boundaries of rounding. What a device does otherwise is done in integers there.

use bytemuck::{Pod, Zeroable};
use half::f16;

use super::device::GpuDevice;
use super::kernels::{Access, Constants, Shape, module};
use super::profile::PlainKernel;
use crate::{Dtype, Error};

/// What a device does as the CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Native {
    /// Multiplies float32s.
    pub(super) products: bool,
    /// Converts float16 to float32 and back.
    pub(super) halves: bool,
}

/// Twin of `Asked` in `shaders/probe.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct Asked {
    pub(super) halves: [u16; 2],
    pub(super) factor: f32,
    pub(super) floats: [f32; 2],
}

/// Twin of `Answered` in `shaders/probe.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(super) struct Answered {
    pub(super) floats: [f32; 2],
    pub(super) multiplied: [u16; 2],
    pub(super) halves: [u16; 2],
    pub(super) product: f32,
}

impl Native {
    /// Before it is known: every device seen multiplies rightly.
    pub(super) const UNKNOWN: Self = Self { products: true, halves: false };

    pub(super) async fn probe(device: &GpuDevice) -> Result<Self, Error> {
        let asked = boundaries();
        let mut found = Self { products: false, halves: false };
        // Some devices have no conversions. One that runs neither kernel has limits that are too low for any.
        for native_halves in [true, false] {
            match answers(device, &asked, native_halves).await {
                Ok(answered) => {
                    found = Self::of(&asked, &answered);
                    found.halves &= native_halves;
                    break;
                }
                Err(Error::DeviceLost(reason)) => return Err(Error::DeviceLost(reason)),
                Err(_) => {}
            }
        }
        Ok(found)
    }

    fn of(asked: &[Asked], answered: &[Answered]) -> Self {
        let all = |same: fn(&Asked, &Answered) -> bool| asked.iter().zip(answered).all(|(a, b)| same(a, b));
        Self { products: all(is_product), halves: all(are_conversions) }
    }
}

pub(super) fn is_product(asked: &Asked, answered: &Answered) -> bool {
    let [a, b] = asked.floats;
    let product = a * b;
    // Kernels rely on no other product.
    !product.is_normal() || answered.product.to_bits() == product.to_bits()
}

pub(super) fn are_conversions(asked: &Asked, answered: &Answered) -> bool {
    let widened = asked.halves.map(|half| f16::from_bits(half).to_f32());
    // Each rounded twice: to a float32, and then to a float16.
    let multiplied = widened.map(|float| f16::from_f32(float * asked.factor).to_bits());
    let narrowed = asked.floats.map(|float| f16::from_f32(float).to_bits());
    answered.floats.map(f32::to_bits) == widened.map(f32::to_bits)
        && answered.multiplied == multiplied
        && answered.halves == narrowed
}

impl Asked {
    /// With the factor that brings the first half to the middle of two float16s, or right beside it.
    pub(super) fn new(halves: [u16; 2], floats: [f32; 2], middle: f32) -> Self {
        let first = f16::from_bits(halves[0]).to_f32();
        let factor = if first == 0.0 { 0.5 } else { middle / first.abs() };
        Self { halves, factor: factor.clamp(0.25, 1.25), floats }
    }
}

/// For every exponent of float16, and both signs: the finite elements of that exponent whose fraction is at an end or in
/// the middle; halfway from each to the next, and the float32s beside; and products of these.
fn boundaries() -> Vec<Asked> {
    // Too small for any float16, but not for a float32.
    let mut asked = vec![Asked::new([0, 0x8000], [2f32.powi(-100), -2f32.powi(-125)], 0.0)];
    for exponent in 0..30_u16 {
        for fraction in [0_u16, 1, 2, 511, 512, 1022, 1023] {
            let half = exponent << 10 | fraction;
            let next = half + 1;
            let [low, high] = [half, next].map(|half| f16::from_bits(half).to_f32());
            let between = f32::midpoint(low, high);
            for float in [low, between.next_down().max(low), between, between.next_up().min(high)] {
                // Its last product is halfway between two float32s if the fraction of the first factor is odd.
                let other = if fraction % 2 == 0 { 1.5 } else { -between };
                asked.push(Asked::new([half, next | 0x8000], [float, other], between));
                asked.push(Asked::new([next, half | 0x8000], [-float, float.next_up().min(high)], between));
            }
        }
    }
    // The largest, which are not rounded up to infinity.
    let largest = f16::MAX.to_f32();
    asked.push(Asked::new([f16::MAX.to_bits(), f16::MIN.to_bits()], [largest, -largest], largest));
    asked
}

/// Runs the kernel.
pub(super) async fn answers(device: &GpuDevice, asked: &[Asked], native_halves: bool) -> Result<Vec<Answered>, Error> {
    const WORKGROUP: u32 = 8;
    // Few enough for any limit.
    const WORKGROUPS: u32 = 16;
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let from = device.filled("gradclip probe, asked", bytemuck::cast_slice(asked), usage)?;
    let size = (asked.len() * size_of::<Answered>()) as u64;
    let to = device.storage("gradclip probe, answered", size, usage)?;
    let shape = Shape { workgroup: WORKGROUP, native_halves, ..Shape::PLAIN };
    let source = module("probe", &Constants::of(Dtype::F16), Access::None, shape);
    device.scoped(|| {
        let kernel = PlainKernel::new(&device.device, "probe", source, [&from, &to], WORKGROUPS);
        let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        kernel.record(&mut encoder, None);
        device.queue.submit([encoder.finish()]);
    })?;
    Ok(bytemuck::pod_collect_to_vec(&device.read(&[(&to, 0, to.size())]).await?))
}

#[cfg(test)]
#[path = "tests/probe.rs"]
mod tests;
