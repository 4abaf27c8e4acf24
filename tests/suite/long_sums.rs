//! Guards against sums that lose their terms: many equal elements, small elements after large ones.

use crate::common::numbers::{Random, Sum, exact_norm, rounded};
use crate::common::{Data, Path, assert_norm, repeats};
use gradclip::{Clip, Clipper, Dtype, Element, NormType, Scope, Tensor};
use rayon::prelude::*;

/// The norm as a plain float32 loop gives it.
fn naive(norm_type: NormType, set: &Data) -> f64 {
    let mut sum = 0f32;
    for x in set.numbers() {
        let x = x as f32;
        sum += if norm_type == NormType::L1 { x.abs() } else { x * x };
    }
    f64::from(if norm_type == NormType::L1 { sum } else { sum.sqrt() })
}

/// Measures on every path. `naive_fails`: that a plain loop is off by more than what is tolerated is asserted as well.
#[track_caller]
fn check(set: &Data, norm_type: NormType, norm: f64, naive_fails: bool, what: &str) {
    if naive_fails {
        let error = (naive(norm_type, set) / norm - 1.0).abs();
        assert!(error > 1e-6, "{what}: a plain loop is off by {error:e} only, so this proves nothing");
    }
    for path in Path::ALL {
        if path.dtypes().contains(&set.dtype) {
            let clip = Clip::norm(f64::INFINITY).norm_type(norm_type);
            let (report, _) = path.clip(&clip, std::slice::from_ref(set)).ok();
            assert_norm(report.total_norm, norm, path.norm_tolerance(), &format!("{what}, {norm_type:?}, {path:?}"));
        }
    }
}

/// The norm of `n` elements of size `x`.
fn of_equal(norm_type: NormType, x: f64, n: usize) -> f64 {
    if norm_type == NormType::L1 { x.abs() * n as f64 } else { x.abs() * (n as f64).sqrt() }
}

#[test]
fn four_million_tenths() {
    let n = 4 << 20;
    let set = Data::of(&vec![0.1f32; n]);
    for norm_type in [NormType::L1, NormType::L2] {
        check(&set, norm_type, of_equal(norm_type, f64::from(0.1f32), n), true, "0.1");
    }
}

#[test]
fn four_million_ones() {
    let n = 4 << 20;
    let set = Data::of(&vec![-1.0f32; n]);
    for norm_type in [NormType::L1, NormType::L2] {
        check(&set, norm_type, of_equal(norm_type, 1.0, n), false, "1.0");
    }
}

/// Beyond 2^24, where adding 1 to a float32 does nothing any more.
#[test]
fn more_ones_than_a_float32_can_count() {
    let n = (16 << 20) + 3_000_001;
    let set = Data::of(&vec![half::bf16::ONE; n]);
    for norm_type in [NormType::L1, NormType::L2] {
        check(&set, norm_type, of_equal(norm_type, 1.0, n), true, "1.0 in bfloat16");
    }
}

/// 4096^2 is 2^24: adding 0.25 a million times leaves a float32 where it was.
#[test]
fn a_million_small_elements_behind_a_large_one() {
    let n = 1_000_000;
    let mut elements = vec![0.5f32; n + 1];
    elements[0] = 4096.0;
    let set = Data::of(&elements);
    check(&set, NormType::L2, (2f64.powi(24) + 0.25 * n as f64).sqrt(), true, "0.5 behind 4096");
    elements[0] = 2f32.powi(23);
    elements[1..].fill(0.25);
    let set = Data::of(&elements);
    check(&set, NormType::L1, 2f64.powi(23) + 0.25 * n as f64, true, "0.25 behind 2^23");
    elements.reverse();
    let set = Data::of(&elements);
    check(&set, NormType::L1, 2f64.powi(23) + 0.25 * n as f64, false, "0.25 before 2^23");
}

#[test]
fn log_normal_sizes() {
    let mut random = Random(21);
    for spread in [1.0, 3.0, 8.0] {
        let elements: Vec<_> = (0..2_000_003).map(|_| (random.normal() * spread).exp() as f32).collect();
        let set = Data::of(&elements);
        for norm_type in [NormType::L1, NormType::L2] {
            let norm = exact_norm(norm_type, elements.iter().map(|x| f64::from(*x)));
            check(&set, norm_type, norm, norm_type == NormType::L1, &format!("log-normal {spread}"));
        }
    }
}

#[test]
fn long_sums_of_every_dtype() {
    let n = 1_500_001;
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
        let x = rounded(dtype, 0.1);
        let set = Data::rounded(dtype, vec![x; n]);
        for norm_type in [NormType::L1, NormType::L2] {
            check(&set, norm_type, of_equal(norm_type, x, n), false, &format!("0.1 in {dtype}"));
        }
    }
}

/// 2^25 elements, more than a float32 counts, or by night 2^27, against sums that lose nothing: normals, sizes over many
/// orders of magnitude, and a constant.
#[test]
fn many_million_elements_on_the_cpu() {
    const BLOCK: usize = 1 << 20;
    let len = repeats(32, 128) * BLOCK;
    let mut data = vec![0f32; len];
    for name in ["normals", "log-normals", "tenths"] {
        data.par_chunks_mut(BLOCK).enumerate().for_each(|(i, block)| {
            let mut random = Random(i as u64);
            block.iter_mut().for_each(|x| {
                *x = match name {
                    "normals" => random.normal() as f32,
                    "log-normals" => (3.0 * random.normal()).exp() as f32,
                    _ => 0.1,
                }
            });
        });
        check_exact(&data, &format!("{name} of float32"));
        let bf16: Vec<_> = data.par_iter().map(|x| half::bf16::from_f32(*x)).collect();
        check_exact(&bf16, &format!("{name} of bfloat16"));
        drop(bf16);
        let f16: Vec<_> = data.par_iter().map(|x| half::f16::from_f32(x.min(65504.0))).collect();
        check_exact(&f16, &format!("{name} of float16"));
    }
    drop(data);
    let f64: Vec<_> = (0..len).into_par_iter().map(|i| Random(i as u64).uniform() - 0.5).collect();
    check_exact(&f64, "float64");
}

/// Holds the CPU's L1 and L2 norm to sums without loss.
fn check_exact<T: Element + Into<f64>>(data: &[T], what: &str) {
    let sum = |term: fn(f64) -> f64| {
        let of_block = |block: &[T]| {
            let mut sum = Sum::default();
            block.iter().for_each(|x| sum.add(term((*x).into())));
            sum.total()
        };
        let blocks: Vec<_> = data.par_chunks(1 << 16).map(of_block).collect();
        let mut sum = Sum::default();
        blocks.into_iter().for_each(|block| sum.add(block));
        sum.total()
    };
    for (norm_type, norm) in [(NormType::L2, sum(|x| x * x).sqrt()), (NormType::L1, sum(f64::abs))] {
        let clip = Clip::norm(f64::INFINITY).norm_type(norm_type);
        let found = Clipper::cpu().measure(&clip, &[Tensor::new(data)]).expect("finite").total_norm;
        println!("{what}: {norm_type:?} is off by {:.1e}", (found / norm - 1.0).abs());
        assert_norm(found, norm, 1e-7, what);
    }
}

/// The reference of these tests is itself right where a plain float64 sum is not.
#[test]
fn the_reference_sum_loses_nothing() {
    let mut sum = Sum::default();
    sum.add(1.0);
    for _ in 0..1_000_000 {
        sum.add(1e-17);
    }
    assert!((sum.total() - (1.0 + 1e-11)).abs() < 1e-15);
}

/// Elements of which each, as the kernels add them up, is a little more than half a unit in the last place of the sum so
/// far: every addition in float32 rounds up by as much as it can. Sixteen are added as a tree, as the kernels say it, or
/// one after another, as a driver may do it. On software devices 4,096 elements are a lane's stretch, of which it adds 12
/// sixteens in float32, or 8 for L1.
#[cfg(feature = "gpu")]
#[test]
fn every_addition_rounds_up() {
    let half = 2f64.powi(-24) * 1.001;
    for norm_type in [NormType::L1, NormType::L2] {
        let span = 16 * if norm_type == NormType::L1 { 8 } else { 12 };
        for tree in [true, false] {
            let element = |i: usize| match i % 4096 % span {
                0 => 1.0,
                1 => half,
                i @ 2..16 if tree => half / f64::from(1 << i.ilog2()),
                2..16 => half,
                _ => half / 16.0,
            };
            let power = norm_type.power();
            let set = [Data::rounded(Dtype::F32, (0..1 << 20).map(|i| element(i).powf(1.0 / power)))];
            let norm = exact_norm(norm_type, set[0].numbers());
            let clip = Clip::norm(f64::INFINITY).norm_type(norm_type);
            for path in Path::ALL {
                let total = path.clip(&clip, &set).ok().0.total_norm;
                let what = format!("{path:?} {norm_type:?}, {}", if tree { "as a tree" } else { "in a row" });
                println!("{what}: off by {:.2e}", (total / norm - 1.0).abs());
                assert_norm(total, norm, path.norm_tolerance(), &what);
            }
        }
    }
}

/// A loss scale by which no sum becomes the middle of two float32.
const SCALE: f64 = 2.3;

/// Elements of examples, and the sums of what a loss scale leaves of them.
fn divided(rows: usize, columns: usize, element: impl Fn(&mut Random) -> f64) -> (Data, Vec<f64>) {
    let mut random = Random(31);
    let elements: Vec<_> = (0..rows * columns).map(|_| element(&mut random) as f32).collect();
    let sum = |column: usize| {
        let mut sum = Sum::default();
        elements[column..].iter().step_by(columns).for_each(|x| sum.add(f64::from(*x)));
        sum.total() / SCALE
    };
    let sums = (0..columns).map(sum).collect();
    (Data::of(&elements).shaped(&[rows, columns]), sums)
}

fn sums_of(path: Path, set: &Data) -> Data {
    let clip = Clip::norm(f64::INFINITY).grad_scale(SCALE).scope(Scope::Example);
    path.sum_examples(&clip, std::slice::from_ref(set)).ok().1.swap_remove(0)
}

/// Rounded before they are added, products would leave a sum off by a unit.
#[test]
fn a_sum_of_four_examples_is_rounded_once() {
    let (set, sums) = divided(4, 1000, |random| random.uniform() + 0.5);
    let early = |column: usize| {
        let products = (0..4).map(|row| (set.get(row * 1000 + column) / SCALE) as f32);
        products.map(f64::from).sum::<f64>() as f32
    };
    let got = sums_of(Path::Cpu, &set);
    for (column, sum) in sums.iter().enumerate() {
        assert_eq!(got.get(column), rounded(Dtype::F32, *sum), "column {column}");
    }
    assert!((0..1000).any(|column| f64::from(early(column)) != got.get(column)), "this proves nothing");
}

#[test]
fn a_million_positive_examples() {
    const ROWS: usize = 1_000_000;
    // Equal elements round the same way at each addition.
    for kind in ["equal", "uniform"] {
        let (set, sums) = divided(ROWS, 2, |random| if kind == "equal" { 0.1 } else { random.uniform() });
        for path in Path::HOST {
            // Promised by `Clipper::sum_examples`.
            let units = if *path == Path::Cpu { 1.001 } else { 98.0 + (ROWS as f64 / 32_768.0).ceil() };
            let got = sums_of(*path, &set);
            for (column, sum) in sums.iter().enumerate() {
                let off = (got.get(column) / sum - 1.0).abs();
                println!("{path:?} {kind}: off by {off:.1e}");
                assert!(off <= units * 2f64.powi(-24), "{path:?}: {kind} {column} is off by {off:e}");
            }
        }
    }
}
