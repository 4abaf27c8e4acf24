//! The operations of an instruction set on [`LANES`] numbers side by side, and the kernels written with them.

/// The number of lanes: numbers that are computed side by side.
pub(in crate::cpu) const LANES: usize = 16;

/// Operations on [`LANES`] numbers at once. A value exists only where the CPU has the instruction set.
pub(in crate::cpu) trait Isa: Copy {
    /// float32.
    type F: Copy;
    /// float64.
    type D: Copy;
    /// Whether an instruction compares 64-bit integers.
    const COMPARES_64_BITS: bool = true;

    fn f(self, numbers: [f32; LANES]) -> Self::F;
    fn d(self, numbers: [f64; LANES]) -> Self::D;
    fn floats(self, x: Self::F) -> [f32; LANES];
    fn doubles(self, x: Self::D) -> [f64; LANES];

    /// Exact; a NaN becomes quiet and keeps its payload.
    fn widen_f16(self, bits: [u16; LANES]) -> Self::F;
    /// To nearest, ties to even; a NaN becomes quiet and keeps its upper payload.
    fn narrow_f16(self, x: Self::F) -> [u16; LANES];
    /// Exact.
    fn widen_bf16(self, bits: [u16; LANES]) -> Self::F;
    /// To nearest, ties to even; a NaN becomes quiet and keeps its upper payload.
    fn narrow_bf16(self, x: Self::F) -> [u16; LANES];
    /// Exact.
    fn widen(self, x: Self::F) -> Self::D;

    fn add_f(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub_f(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul_f(self, a: Self::F, b: Self::F) -> Self::F;
    fn div_f(self, a: Self::F, b: Self::F) -> Self::F;
    fn sqrt_f(self, x: Self::F) -> Self::F;
    /// `x` where a < b, and `y` elsewhere, also where a or b is NaN.
    fn if_less_f(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// 0 in place of NaN and infinity.
    fn finite_or_zero_f(self, x: Self::F) -> Self::F;

    fn add(self, a: Self::D, b: Self::D) -> Self::D;
    fn sub(self, a: Self::D, b: Self::D) -> Self::D;
    fn mul(self, a: Self::D, b: Self::D) -> Self::D;
    fn div(self, a: Self::D, b: Self::D) -> Self::D;
    fn sqrt(self, x: Self::D) -> Self::D;
    fn abs(self, x: Self::D) -> Self::D;
    /// `x` where a < b, and `y` elsewhere, also where a or b is NaN.
    fn if_less(self, a: Self::D, b: Self::D, x: Self::D, y: Self::D) -> Self::D;

    // On the 64 bits of each number.
    fn and_bits(self, a: Self::D, b: Self::D) -> Self::D;
    fn or_bits(self, a: Self::D, b: Self::D) -> Self::D;
    fn add_bits(self, a: Self::D, b: Self::D) -> Self::D;
    /// Shifts down by 52 bits: the exponent moves to the lowest bits.
    fn down_52(self, x: Self::D) -> Self::D;
    /// Shifts up by 52 bits: the lowest bits move to the exponent.
    fn up_52(self, x: Self::D) -> Self::D;
}

/// A loop over elements, compiled for each instruction set. All that it calls must be inlined.
pub(in crate::cpu) trait Kernel {
    type Output;
    fn on<I: Isa>(self, isa: I) -> Self::Output;
}
