//! [`Dtype`]: the element types, and the Rust types that hold them.

use half::{bf16, f16};

/// The element types that can be clipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary64; on the CPU only, because WGSL has no 64-bit floats.
    F64,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
}

impl Dtype {
    /// The size of one element in bytes.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// Whether another dtype holds every element of this one exactly.
    pub(crate) fn fits_in(self, other: Self) -> bool {
        self == other || other == Self::F64 || (other == Self::F32 && self != Self::F64)
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        })
    }
}

mod sealed {
    use super::Dtype;

    pub trait Sealed {
        /// The dtype of this type.
        const DTYPE: Dtype;
    }
    impl Sealed for f32 {
        const DTYPE: Dtype = Dtype::F32;
    }
    impl Sealed for f64 {
        const DTYPE: Dtype = Dtype::F64;
    }
    impl Sealed for half::f16 {
        const DTYPE: Dtype = Dtype::F16;
    }
    impl Sealed for half::bf16 {
        const DTYPE: Dtype = Dtype::BF16;
    }
}

/// A Rust type that holds one element: `f32`, `f64`, [`half::f16`] or [`half::bf16`]. Sealed.
pub trait Element: sealed::Sealed + bytemuck::Pod + Send + Sync {}
impl Element for f32 {}
impl Element for f64 {}
impl Element for f16 {}
impl Element for bf16 {}

/// Calls `$body` with `$T` standing for the Rust type of `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            crate::Dtype::F32 => {
                type $T = f32;
                $body
            }
            crate::Dtype::F64 => {
                type $T = f64;
                $body
            }
            crate::Dtype::F16 => {
                type $T = half::f16;
                $body
            }
            crate::Dtype::BF16 => {
                type $T = half::bf16;
                $body
            }
        }
    };
}

pub(crate) use with_element;
