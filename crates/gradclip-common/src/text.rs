//! Numbers, counts, names and tables as text.

/// A name from a file as it is printed: control characters are escaped.
#[must_use]
pub fn shown(name: &str) -> String {
    name.escape_debug().to_string()
}

/// Lines of labels and their values.
#[must_use]
pub fn table(lines: &[(&'static str, String)]) -> String {
    lines.iter().map(|(label, text)| format!("{label:<12} {text}\n")).collect()
}

/// `2,000`.
#[must_use]
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 tensor`, `2,000 tensors`.
#[must_use]
pub fn plural(count: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// A number with all its digits, in short form.
#[must_use]
pub fn exact(x: f64) -> String {
    let plain = x == 0.0 || !x.is_finite() || (1e-4..1e16).contains(&x.abs());
    if plain { x.to_string() } else { format!("{x:e}") }
}

/// A number with this many significant digits, without trailing zeros.
#[must_use]
pub fn number(x: f64, digits: i32) -> String {
    if x == 0.0 {
        return "0".into();
    }
    if !x.is_finite() {
        return x.to_string();
    }
    let exponent = x.abs().log10().floor() as i32;
    let decimals = (digits - 1 - exponent).max(0) as usize;
    let (text, power) = if (-4..9).contains(&exponent) {
        (format!("{x:.decimals$}"), String::new())
    } else {
        let text = format!("{x:.*e}", (digits - 1) as usize);
        text.split_once('e').map(|(text, power)| (text.to_owned(), format!("e{power}"))).unwrap_or_default()
    };
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{power}")
}

/// A number of elements, with Ki, Mi or Gi behind it if that is exact.
#[must_use]
pub fn size_label(elements: u64) -> String {
    for (unit, shift) in [("Gi", 30), ("Mi", 20), ("Ki", 10)] {
        if elements.trailing_zeros() >= shift {
            return format!("{}{unit}", elements >> shift);
        }
    }
    elements.to_string()
}

/// A part of a whole in percent, `-` if it is none.
#[must_use]
pub fn percent(part: f64) -> String {
    if part.is_finite() { format!("{}%", number(100.0 * part, 3)) } else { "-".into() }
}

#[cfg(test)]
mod tests {
    use super::{exact, grouped, number, percent};

    #[test]
    fn numbers_are_short_and_right() {
        let cases = [
            (0.0, "0"),
            (-0.0, "0"),
            (0.5, "0.5"),
            (-0.25, "-0.25"),
            (65536.0, "65536"),
            (100.0, "100"),
            (0.524_587_283_495, "0.5245873"),
            (1e20, "1e20"),
            (-1.25e-25, "-1.25e-25"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "NaN"),
        ];
        for (x, text) in cases {
            assert_eq!(number(x, 7), text);
        }
        for (x, text) in [(5.0, "5"), (0.1, "0.1"), (1e-310, "1e-310"), (2.5e300, "2.5e300"), (f64::NAN, "NaN")] {
            assert_eq!(exact(x), text);
        }
        for (x, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (45_004, "45,004"), (1 << 30, "1,073,741,824")] {
            assert_eq!(grouped(x), text);
        }
        assert_eq!([0.0, 0.25, f64::NAN].map(percent), ["0%", "25%", "-"]);
    }
}
