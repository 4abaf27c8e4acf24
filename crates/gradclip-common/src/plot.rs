//! A plot of norms: one row per tensor, on a logarithmic axis.

use std::fmt::Write;

use crate::text::number;

/// One row of the plot.
#[derive(Debug)]
pub struct TensorNorm {
    /// The name of the tensor.
    pub label: String,
    /// Its norm.
    pub norm: f64,
    /// How many elements are not finite. Counted only if the norm is not; then 0 means that the norm overflows.
    pub non_finite: u64,
}

/// The width of every plot, in pixels.
pub const WIDTH: f64 = 960.0;
/// Positions and sizes, in pixels.
const TOP: f64 = 84.0;
const BOTTOM: f64 = 40.0;
/// The height of all rows together, if each is still legible.
const ROWS: f64 = 960.0;
/// The room that one label needs.
const LABEL: f64 = 14.0;
/// The longest label, in characters.
const LONGEST: usize = 44;

/// The plot as an SVG document.
#[must_use]
pub fn draw(title: &str, rows: &[TensorNorm], total: f64) -> String {
    let positive = |norm: &f64| norm.is_finite() && *norm > 0.0;
    let norms: Vec<_> = rows.iter().map(|row| row.norm).chain([total]).filter(positive).map(f64::log10).collect();
    let lowest = norms.iter().copied().fold(f64::INFINITY, f64::min).floor();
    let highest = norms.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil();
    let (lowest, highest) = if norms.is_empty() { (-1.0, 0.0) } else { (lowest, highest.max(lowest + 1.0)) };
    let decades = highest - lowest;

    let pitch = (ROWS / rows.len().max(1) as f64).clamp(3.0, 18.0);
    let bottom = TOP + pitch * rows.len().max(1) as f64;
    let longest = rows.iter().map(|row| row.label.chars().count().min(LONGEST)).max().unwrap_or(0);
    let left = 24.0 + 6.6 * longest as f64;
    // Zeros are left of the axis, non-finite norms right of it.
    let start = if rows.iter().any(|row| row.norm == 0.0) { left + 56.0 } else { left + 12.0 };
    let end = if rows.iter().any(|row| !row.norm.is_finite()) { WIDTH - 150.0 } else { WIDTH - 24.0 };
    let x = |log: f64| start + (log - lowest) / decades * (end - start);

    let height = bottom + BOTTOM;
    let mut svg = document(title, height);
    let mut line = |x: f64, from: f64, style: &str| {
        let _ = writeln!(svg, r#"<line x1="{x:.1}" x2="{x:.1}" y1="{from}" y2="{bottom:.1}" {style}/>"#);
    };
    let powers = |step: f64| (0..=(decades / step) as i32).map(move |i| lowest + step * f64::from(i));
    if decades <= 4.0 {
        for (power, digit) in powers(1.0).flat_map(|power| (2..10).map(move |digit| (power, f64::from(digit).log10())))
        {
            if power < highest {
                line(x(power + digit), TOP, r##"stroke="#f0f0f0""##);
            }
        }
    }
    let step = (decades / 12.0).ceil();
    powers(step).for_each(|power| line(x(power), TOP, r##"stroke="#ccc""##));
    if positive(&total) {
        line(x(total.log10()), TOP - 12.0, r##"stroke="#333" stroke-width="1.5" stroke-dasharray="6 4""##);
    }
    let mut text = |x: f64, y: f64, anchor: &str, text: &str| {
        let _ = writeln!(svg, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escaped(text));
    };
    for power in powers(step) {
        text(x(power), bottom + 18.0, "middle", &format!("1e{power}"));
    }
    let count = rows.len();
    let tensors = format!("{count} tensor{}, total norm {}", if count == 1 { "" } else { "s" }, number(total, 6));
    text(24.0, 50.0, "start", &tensors);
    if positive(&total) {
        // Near the right edge the word stands left of the line.
        let at = x(total.log10());
        let anchor = if at > WIDTH - 80.0 { "end" } else { "middle" };
        text(at, TOP - 16.0, anchor, "total");
    }
    if start > left + 12.0 {
        text(left + 16.0, bottom + 18.0, "middle", "0");
    }

    let labelled = labelled(rows, (LABEL / pitch).ceil() as usize);
    let radius = (0.3 * pitch).clamp(1.5, 4.5);
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + pitch * (i as f64 + 0.5);
        let value = match row.non_finite {
            0 => number(row.norm, 6),
            count => format!("{count} non-finite"),
        };
        let _ = write!(svg, "<g><title>{}: {value}</title>", escaped(&row.label));
        if labelled[i] {
            let label = escaped(&abbreviated(&row.label));
            let _ = write!(
                svg,
                r#"<text x="{left:.1}" y="{:.1}" font-size="11" text-anchor="end">{label}</text>"#,
                y + 4.0
            );
        }
        let mark = |x: f64, style: &str| format!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="{radius}" {style}/>"#);
        let _ = match row.norm {
            0.0 => writeln!(svg, "{}</g>", mark(left + 16.0, r##"fill="none" stroke="#777""##)),
            norm if norm.is_finite() => {
                let at = x(norm.log10());
                let stem = format!(r##"<path d="M{start:.1} {y:.1}H{at:.1}" stroke="#a9c4e0"/>"##);
                writeln!(svg, "{stem}{}</g>", mark(at, r##"fill="#2166ac""##))
            }
            _ => {
                let mark = mark(end + 20.0, r##"fill="#d7301f""##);
                let words = if labelled[i] { value.as_str() } else { "" };
                writeln!(
                    svg,
                    r##"{mark}<text x="{:.1}" y="{:.1}" font-size="11" fill="#d7301f">{words}</text></g>"##,
                    end + 32.0,
                    y + 4.0
                )
            }
        };
    }
    svg + "</svg>\n"
}

/// The beginning of an SVG document with a title.
#[must_use]
pub fn document(title: &str, height: f64) -> String {
    let title = escaped(title);
    format!(
        r##"<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" version="1.1" width="{WIDTH}" height="{height:.0}" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="12" fill="#333">
<rect width="100%" height="100%" fill="#fff"/>
<text x="24" y="30" font-size="16" font-weight="bold">{title}</text>
"##
    )
}

/// Which rows get a label, if labels must be this many rows apart. Rows that are not finite come first.
fn labelled(rows: &[TensorNorm], apart: usize) -> Vec<bool> {
    let mut labelled = vec![false; rows.len()];
    for all in [false, true] {
        for i in (0..rows.len()).filter(|i| all || !rows[*i].norm.is_finite()) {
            let around = (i + 1).saturating_sub(apart)..(i + apart).min(rows.len());
            labelled[i] |= !labelled[around].contains(&true);
        }
    }
    labelled
}

/// Shortened in the middle, since names differ at their ends.
fn abbreviated(label: &str) -> String {
    let characters: Vec<_> = label.chars().collect();
    if characters.len() <= LONGEST {
        return label.to_owned();
    }
    let (head, tail) = (&characters[..LONGEST / 2 - 1], &characters[characters.len() - LONGEST / 2..]);
    head.iter().chain(&['…']).chain(tail).collect()
}

/// Escapes text for XML. Control characters are escaped before.
#[must_use]
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Moves names apart that would overlap, and back into the panel.
pub fn spread(names: &mut [(f64, String, &str)], top: f64, bottom: f64) {
    const APART: f64 = 14.0;
    names.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut least = top - APART;
    for (at, ..) in names.iter_mut() {
        *at = at.max(least + APART);
        least = *at;
    }
    let mut most = bottom + APART;
    for (at, ..) in names.iter_mut().rev() {
        *at = at.min(most - APART);
        most = *at;
    }
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn names_stand_apart_and_inside() {
        let mut names: Vec<_> = [100.0, 100.0, 99.0, 218.0, 219.0, 0.0].map(|y| (y, String::new(), "")).into();
        spread(&mut names, 0.0, 220.0);
        assert!(names.windows(2).all(|pair| pair[1].0 - pair[0].0 > 13.9), "{names:?}");
        assert!(names.iter().all(|(y, ..)| (0.0..=220.0).contains(y)), "{names:?}");
    }
}
