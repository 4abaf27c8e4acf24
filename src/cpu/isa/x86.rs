//! AVX2 and AVX-512: the same operations on registers of 256 and 512 bits.
//!
//! A value of [`Avx2`] or [`Avx512`] is made only where the CPU has the features of its name, and its private field
//! keeps other modules from making one. That is the proof of every `unsafe` here: an intrinsic needs only its feature.

use std::arch::is_x86_feature_detected;
use std::arch::x86_64::*;
use std::sync::LazyLock;

use bytemuck::must_cast;

use super::portable::Portable;
use super::{Isa, Kernel, LANES};

/// AVX2 and F16C. Made by [`Avx2::new`] only.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx2(());

/// AVX-512 F, BW, DQ and VL, and what [`Avx2`] has. Made by [`Avx512::new`] only.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Avx512(());

impl Avx2 {
    fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

impl Avx512 {
    fn new() -> Option<Self> {
        let all = Avx2::new().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        all.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,f16c")]
fn avx2<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
    kernel.on(isa)
}

#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
    kernel.on(isa)
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy)]
pub(in crate::cpu) enum Set {
    Portable,
    Avx2(Avx2),
    Avx512(Avx512),
}

impl Set {
    /// All sets of this CPU, with their names; the best is last.
    pub(in crate::cpu) fn all() -> impl DoubleEndedIterator<Item = (&'static str, Self)> {
        let avx2 = Avx2::new().map(|isa| ("AVX2", Self::Avx2(isa)));
        let avx512 = Avx512::new().map(|isa| ("AVX-512", Self::Avx512(isa)));
        [Some(("portable", Self::Portable)), avx2, avx512].into_iter().flatten()
    }

    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable => kernel.on(Portable),
            // SAFETY: The CPU must have the features of `avx2`: `isa` exists only where it has.
            Self::Avx2(isa) => unsafe { avx2(isa, kernel) },
            // SAFETY: The CPU must have the features of `avx512`: `isa` exists only where it has.
            Self::Avx512(isa) => unsafe { avx512(isa, kernel) },
        }
    }
}

/// Runs a kernel on the best set.
pub(super) fn run<K: Kernel>(kernel: K) -> K::Output {
    static BEST: LazyLock<Set> = LazyLock::new(|| Set::all().next_back().map_or(Set::Portable, |(_, set)| set));
    BEST.run(kernel)
}

/// Registers hold numbers in their order.
macro_rules! casts {
    () => {
        #[inline(always)]
        fn f(self, numbers: [f32; LANES]) -> Self::F {
            must_cast(numbers)
        }
        #[inline(always)]
        fn d(self, numbers: [f64; LANES]) -> Self::D {
            must_cast(numbers)
        }
        #[inline(always)]
        fn floats(self, x: Self::F) -> [f32; LANES] {
            must_cast(x)
        }
        #[inline(always)]
        fn doubles(self, x: Self::D) -> [f64; LANES] {
            must_cast(x)
        }
    };
}

/// A method that does the same with each register. The body may use intrinsics of the set's features only.
macro_rules! each {
    ($of:ident: $($name:ident($($x:ident),+) = $body:expr;)*) => {
        $(#[inline(always)]
        fn $name(self, $($x: Self::$of),+) -> Self::$of {
            let mut result = [$($x),+][0];
            let mut i = 0;
            while i < result.len() {
                $(let $x = $x[i];)+
                // SAFETY: The CPU must have the set's features: `self` exists only where it has.
                result[i] = unsafe { $body };
                i += 1;
            }
            result
        })*
    };
}

impl Isa for Avx2 {
    type F = [__m256; 2];
    type D = [__m256d; 4];

    casts!();

    #[inline(always)]
    fn widen_f16(self, bits: [u16; LANES]) -> Self::F {
        let [low, high]: [__m128i; 2] = must_cast(bits);
        // SAFETY: The CPU must have F16C: `self` exists only where it has.
        unsafe { [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)] }
    }
    #[inline(always)]
    fn narrow_f16(self, [low, high]: Self::F) -> [u16; LANES] {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        // SAFETY: The CPU must have F16C: `self` exists only where it has.
        must_cast(unsafe { [_mm256_cvtps_ph::<NEAREST>(low), _mm256_cvtps_ph::<NEAREST>(high)] })
    }
    #[inline(always)]
    fn widen_bf16(self, bits: [u16; LANES]) -> Self::F {
        let [low, high]: [__m128i; 2] = must_cast(bits);
        // SAFETY: The CPU must have AVX2: `self` exists only where it has.
        unsafe {
            let wide = [_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)];
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[0])),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide[1])),
            ]
        }
    }
    #[inline(always)]
    fn narrow_bf16(self, [low, high]: Self::F) -> [u16; LANES] {
        // SAFETY: The CPU must have AVX2: `self` exists only where it has.
        unsafe {
            let upper = [bf16_of(low), bf16_of(high)];
            // Packing works on halves of a register, so its second and third quarters must change places.
            must_cast(_mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(upper[0], upper[1])))
        }
    }
    #[inline(always)]
    fn widen(self, [low, high]: Self::F) -> Self::D {
        // SAFETY: The CPU must have AVX: `self` exists only where it has.
        unsafe {
            [
                _mm256_cvtps_pd(_mm256_castps256_ps128(low)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(low)),
                _mm256_cvtps_pd(_mm256_castps256_ps128(high)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(high)),
            ]
        }
    }

    each! {
        F:
        add_f(a, b) = _mm256_add_ps(a, b);
        sub_f(a, b) = _mm256_sub_ps(a, b);
        mul_f(a, b) = _mm256_mul_ps(a, b);
        div_f(a, b) = _mm256_div_ps(a, b);
        sqrt_f(x) = _mm256_sqrt_ps(x);
        if_less_f(a, b, x, y) = _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
    }
    #[inline(always)]
    fn finite_or_zero_f(self, [low, high]: Self::F) -> Self::F {
        // SAFETY: The CPU must have AVX: `self` exists only where it has.
        unsafe { [finite_or_zero(low), finite_or_zero(high)] }
    }

    each! {
        D:
        add(a, b) = _mm256_add_pd(a, b);
        sub(a, b) = _mm256_sub_pd(a, b);
        mul(a, b) = _mm256_mul_pd(a, b);
        div(a, b) = _mm256_div_pd(a, b);
        sqrt(x) = _mm256_sqrt_pd(x);
        abs(x) = _mm256_andnot_pd(_mm256_set1_pd(-0.0), x);
        if_less(a, b, x, y) = _mm256_blendv_pd(y, x, _mm256_cmp_pd::<_CMP_LT_OQ>(a, b));
        and_bits(a, b) = _mm256_and_pd(a, b);
        or_bits(a, b) = _mm256_or_pd(a, b);
        add_bits(a, b) = _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a), _mm256_castpd_si256(b)));
        down_52(x) = _mm256_castsi256_pd(_mm256_srli_epi64::<52>(_mm256_castpd_si256(x)));
        up_52(x) = _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(x)));
    }
}

/// The upper halves of 8 float32, rounded.
#[inline]
#[target_feature(enable = "avx2")]
fn bf16_of(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let upper = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
    let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn finite_or_zero(x: __m256) -> __m256 {
    let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
    _mm256_and_ps(x, _mm256_cmp_ps::<_CMP_LT_OQ>(size, _mm256_set1_ps(f32::INFINITY)))
}

impl Isa for Avx512 {
    type F = [__m512; 1];
    type D = [__m512d; 2];

    casts!();

    #[inline(always)]
    fn widen_f16(self, bits: [u16; LANES]) -> Self::F {
        // SAFETY: The CPU must have AVX-512F: `self` exists only where it has.
        unsafe { [_mm512_cvtph_ps(must_cast(bits))] }
    }
    #[inline(always)]
    fn narrow_f16(self, [x]: Self::F) -> [u16; LANES] {
        // SAFETY: The CPU must have AVX-512F: `self` exists only where it has.
        must_cast(unsafe { _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x) })
    }
    #[inline(always)]
    fn widen_bf16(self, bits: [u16; LANES]) -> Self::F {
        // SAFETY: The CPU must have AVX-512F: `self` exists only where it has.
        unsafe { [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(must_cast(bits))))] }
    }
    #[inline(always)]
    fn narrow_bf16(self, [x]: Self::F) -> [u16; LANES] {
        // SAFETY: The CPU must have AVX-512F: `self` exists only where it has.
        let halves = unsafe {
            let bits = _mm512_castps_si512(x);
            let upper = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            let sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
            _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, _mm512_srli_epi32::<16>(sum), quiet))
        };
        must_cast(halves)
    }
    #[inline(always)]
    fn widen(self, [x]: Self::F) -> Self::D {
        // SAFETY: The CPU must have AVX-512 F and DQ: `self` exists only where it has.
        unsafe { [_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(x))] }
    }

    each! {
        F:
        add_f(a, b) = _mm512_add_ps(a, b);
        sub_f(a, b) = _mm512_sub_ps(a, b);
        mul_f(a, b) = _mm512_mul_ps(a, b);
        div_f(a, b) = _mm512_div_ps(a, b);
        sqrt_f(x) = _mm512_sqrt_ps(x);
        if_less_f(a, b, x, y) = _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x);
    }
    #[inline(always)]
    fn finite_or_zero_f(self, [x]: Self::F) -> Self::F {
        // SAFETY: The CPU must have AVX-512F: `self` exists only where it has.
        unsafe {
            let finite = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(_mm512_abs_ps(x), _mm512_set1_ps(f32::INFINITY));
            [_mm512_maskz_mov_ps(finite, x)]
        }
    }

    each! {
        D:
        add(a, b) = _mm512_add_pd(a, b);
        sub(a, b) = _mm512_sub_pd(a, b);
        mul(a, b) = _mm512_mul_pd(a, b);
        div(a, b) = _mm512_div_pd(a, b);
        sqrt(x) = _mm512_sqrt_pd(x);
        abs(x) = _mm512_abs_pd(x);
        if_less(a, b, x, y) = _mm512_mask_blend_pd(_mm512_cmp_pd_mask::<_CMP_LT_OQ>(a, b), y, x);
        and_bits(a, b) = _mm512_and_pd(a, b);
        or_bits(a, b) = _mm512_or_pd(a, b);
        add_bits(a, b) = _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(a), _mm512_castpd_si512(b)));
        down_52(x) = _mm512_castsi512_pd(_mm512_srli_epi64::<52>(_mm512_castpd_si512(x)));
        up_52(x) = _mm512_castsi512_pd(_mm512_slli_epi64::<52>(_mm512_castpd_si512(x)));
    }
}
