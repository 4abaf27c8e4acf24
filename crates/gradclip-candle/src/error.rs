//! The errors, and what the caller can do about them.

use candle_core::{DType, DeviceLocation, Shape, Tensor};

/// Every error of this crate. After an error no gradient has changed.
///
/// It becomes a [`candle_core::Error`] by `?`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the library: a setting out of bounds, a NaN under the policy `Error`, a shape that does not fit the scope.
    #[error(transparent)]
    Clip(#[from] gradclip::Error),
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A gradient is on a GPU, or the value of a var that adaptive gradient clipping needs. Move it to the CPU, and back after
    /// the clip.
    #[error("{tensor} is on {device}; this crate clips on the CPU: move it there first, with to_device(&Device::Cpu)")]
    Device {
        /// The tensor, by the name or number of its var.
        tensor: String,
        /// Where it is, such as `cuda:0`.
        device: String,
    },
    /// A gradient has integers or a float format that cannot be clipped, or the value of a var has that adaptive gradient
    /// clipping needs. Convert it with `to_dtype`.
    #[error("{tensor} is {}; only f16, bf16, f32 and f64 can be clipped: convert it with to_dtype", dtype.as_str())]
    Dtype {
        /// The tensor, by the name or number of its var.
        tensor: String,
        /// Its dtype.
        dtype: DType,
    },
    /// A gradient has another shape than its var, so it belongs to another var. Check where it was inserted.
    #[error("{tensor} has the shape {gradient:?}, but its var {var:?}; is it another var's gradient?")]
    Shape {
        /// The gradient, by the name or number of its var.
        tensor: String,
        /// Its shape.
        gradient: Shape,
        /// The shape of its var.
        var: Shape,
    },
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}

/// Checks that a tensor can be read and clipped here.
pub(crate) fn check(label: impl Fn() -> String, tensor: &Tensor) -> Result<(), Error> {
    check_kind(label, tensor.device().location(), tensor.dtype())
}

fn check_kind(label: impl Fn() -> String, location: DeviceLocation, dtype: DType) -> Result<(), Error> {
    let device = match location {
        DeviceLocation::Cpu => None,
        DeviceLocation::Cuda { gpu_id } => Some(format!("cuda:{gpu_id}")),
        DeviceLocation::Metal { gpu_id } => Some(format!("metal:{gpu_id}")),
    };
    if let Some(device) = device {
        return Err(Error::Device { tensor: label(), device });
    }
    match dtype {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        dtype => Err(Error::Dtype { tensor: label(), dtype }),
    }
}

/// The error if another thread has replaced the contents of a storage. Safe code can do so only by an operation of its own.
pub(crate) fn replaced() -> Error {
    candle_core::Error::msg("a gradient was replaced while it was clipped").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No test can make a tensor on a device that candle was not built for.
    #[test]
    fn a_tensor_on_a_gpu_is_named_with_what_to_do() {
        for (location, device) in
            [(DeviceLocation::Cuda { gpu_id: 1 }, "cuda:1"), (DeviceLocation::Metal { gpu_id: 0 }, "metal:0")]
        {
            // Of any dtype: converting it first would not help.
            for dtype in [DType::F32, DType::I64] {
                let error = check_kind(|| "the gradient of \"w\"".into(), location, dtype).expect_err("not on the CPU");
                let expected = format!(
                    "the gradient of \"w\" is on {device}; this crate clips on the CPU: move it there first, with \
                     to_device(&Device::Cpu)"
                );
                assert_eq!(error.to_string(), expected);
            }
        }
    }
}
