//! The values of options: how they are named, read and printed.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use gradclip::{Budget, Dtype, NonFinite, Scope, UnitAxis};

/// Values of an option: the name, the value and the help text.
pub(crate) type Names<T> = [(&'static str, T, &'static str)];

pub(crate) const SCOPES: &Names<Scope> = &[
    ("global", Scope::Global, "All gradients together"),
    ("tensor", Scope::Tensor, "Each tensor"),
    ("unit", Scope::Unit, "Each unit of each tensor: a row, a column or what else --unit-axis says"),
    ("example", Scope::Example, "Each example, over all tensors; dimension 0 of a tensor numbers the examples"),
    ("example-tensor", Scope::ExampleTensor, "Each example of each tensor"),
];

pub(crate) const BUDGETS: &Names<Budget> = &[
    ("each", Budget::Each, "Each tensor gets N"),
    ("uniform", Budget::Uniform, "Each tensor gets N / sqrt(number of tensors)"),
    ("sized", Budget::Sized, "Each tensor gets N * sqrt(its elements / all elements)"),
];

pub(crate) const POLICIES: &Names<NonFinite> = &[
    ("error", NonFinite::Error, "Stop with exit code 3"),
    ("propagate", NonFinite::Propagate, "Compute with these elements, as PyTorch does"),
    ("skip", NonFinite::Skip, "Leave all gradients as they are"),
    ("zero", NonFinite::Zero, "Set all gradients that share a norm with these elements to 0"),
    ("drop", NonFinite::Drop, "Set these elements to 0 and clip the rest"),
];

pub(crate) const OUT_DTYPES: &Names<Dtype> = &[("float32", Dtype::F32, "In place of float16 and bfloat16")];

/// Parses the name of one of these values.
pub(crate) fn one_of<T: Copy + Send + Sync + 'static>(names: &'static Names<T>) -> impl TypedValueParser<Value = T> {
    let named = |(name, _, help): &(&'static str, _, &'static str)| PossibleValue::new(name).help(help);
    PossibleValuesParser::new(names.iter().map(named)).try_map(|text| {
        let found = names.iter().find(|(name, ..)| *name == text);
        found.map(|(_, value, _)| *value).ok_or("unknown value")
    })
}

/// Parses the axes of units as the library prints them.
pub(crate) fn unit_axis(text: &str) -> Result<UnitAxis, String> {
    let named = [UnitAxis::First, UnitAxis::Last, UnitAxis::Optax].into_iter().find(|axis| axis.to_string() == text);
    let (list, is_over) = text.strip_prefix("over:").map_or((text, false), |list| (list, true));
    let axes: Result<Vec<isize>, _> = list.split(',').map(|axis| axis.trim().parse()).collect();
    match (named, axes) {
        (Some(axis), _) => Ok(axis),
        (_, Ok(axes)) if is_over => Ok(UnitAxis::over(&axes)),
        (_, Ok(axes)) => Ok(UnitAxis::axes(&axes)),
        _ => Err("give first, last, optax, axes like 0 or 0,-1, or over:0,-1".into()),
    }
}

/// Parses `MIN,MAX`.
pub(crate) fn range(text: &str) -> Result<(f64, f64), String> {
    let number = |text: &str| text.trim().parse::<f64>().map_err(|_| format!("{text:?} is not a number"));
    let (min, max) = text.split_once(',').ok_or("give two numbers: MIN,MAX")?;
    Ok((number(min)?, number(max)?))
}

/// Parses `PATTERN=MAX`. A name may hold the sign.
pub(crate) fn group(text: &str) -> Result<(String, f64), String> {
    let (pattern, max) = text.rsplit_once('=').ok_or("give a pattern and a threshold: PATTERN=MAX")?;
    Ok((pattern.to_owned(), max.trim().parse().map_err(|_| format!("{max:?} is not a number"))?))
}

/// How the elements of a benchmark are cut into tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    One,
    Transformer,
    /// This many tensors, alternately long and short.
    Many(u64),
}

/// Parses a number of elements, with Ki, Mi or Gi behind it.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let units = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("", 0)];
    let (digits, shift) =
        units.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift))).unwrap_or((text, 0));
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err("a size is a number of elements like 1000, 64Ki, 16Mi or 1Gi".into());
    }
    let too_large = || format!("at most {LARGEST} elements are possible: no memory holds more");
    let number: u64 = digits.parse().map_err(|_| too_large())?;
    match number.checked_mul(1 << shift).filter(|size| *size <= LARGEST) {
        Some(0) => Err("at least 1 element is needed".into()),
        Some(size) => Ok(size),
        None => Err(too_large()),
    }
}

/// Up to here no number of bytes overflows.
const LARGEST: u64 = 1 << 50;

/// Parses the dtype of a benchmark.
pub(crate) fn dtype(text: &str) -> Result<Dtype, String> {
    match text {
        "f32" | "float32" => Ok(Dtype::F32),
        "f16" | "float16" => Ok(Dtype::F16),
        "bf16" | "bfloat16" => Ok(Dtype::BF16),
        _ => Err("a dtype is f32, f16 or bf16".into()),
    }
}

/// Parses a [`Cut`].
pub(crate) fn cut(text: &str) -> Result<Cut, String> {
    match text {
        "one" => Ok(Cut::One),
        "transformer" => Ok(Cut::Transformer),
        _ => match text.parse() {
            Ok(count @ 1..=1_000_000) => Ok(Cut::Many(count)),
            _ => Err("give one, transformer, or a number of tensors from 1 to 1000000".into()),
        },
    }
}

/// Parses a duration.
pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| (0.0..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "give a number of seconds from 0 to 3600".into())
}

#[cfg(test)]
mod tests {
    use gradclip_common::text::size_label;

    use super::*;

    #[test]
    fn sizes_read_like_people_write_them() {
        let cases =
            [("1", 1), ("1000", 1000), ("64Ki", 65_536), (" 16Mi", 16 << 20), ("1Gi", 1 << 30), ("3Gi", 3 << 30)];
        for (text, elements) in cases {
            assert_eq!(size(text), Ok(elements), "{text}");
            assert_eq!(size(&size_label(elements)), Ok(elements), "{text}");
        }
        assert_eq!([1000, 1 << 10, 3 << 20, 1 << 30].map(size_label), ["1000", "1Ki", "3Mi", "1Gi"]);
        for text in ["", "Ki", "-1", "1.5Mi", "1k", "64KiB", "0x10", "１", "1Ti", "+1", "1 Ki"] {
            assert!(size(text).is_err_and(|why| why.contains("64Ki")), "{text}");
        }
        for text in ["0", "0Gi"] {
            assert!(size(text).is_err_and(|why| why.contains("at least 1")), "{text}");
        }
        for text in ["18446744073709551616", "18446744073709551615Gi", "2000000Gi"] {
            assert!(size(text).is_err_and(|why| why.contains("no memory")), "{text}");
        }
    }
}
