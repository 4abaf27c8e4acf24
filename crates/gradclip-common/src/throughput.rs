//! A plot of throughput: a panel for each dtype, a curve for each case, and lines at the copy and the read speed.

use std::fmt::Write;

use gradclip::Dtype;
use serde::Serialize;

use crate::plot::{WIDTH, document, escaped, spread};
use crate::text::{number, plural, size_label};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Case {
    /// Only measures.
    Norm,
    /// A clip that changes nothing.
    Unclipped,
    /// A clip by norm that changes every element.
    Clipped,
    /// A clip by value.
    Value,
}

/// All of them.
pub const CASES: [Case; 4] = [Case::Norm, Case::Unclipped, Case::Clipped, Case::Value];

impl Case {
    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Unclipped => "unclipped",
            Self::Clipped => "clipped",
            Self::Value => "value",
        }
    }

    /// The bytes that must be read or written for so many elements.
    #[must_use]
    pub fn bytes(self, dtype: Dtype, elements: u64) -> u64 {
        let moves = match self {
            Self::Norm | Self::Unclipped => 1,
            Self::Clipped => 3,
            Self::Value => 2,
        };
        moves * elements * dtype.size() as u64
    }

    /// Whether gradients change.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::Clipped | Self::Value)
    }
}

/// The result of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The dtype of the elements.
    #[serde(serialize_with = "as_text")]
    pub dtype: Dtype,
    /// How many elements were clipped.
    pub elements: u64,
    /// In how many tensors.
    pub tensors: usize,
    /// What was timed.
    pub case: Case,
    /// The median of the runs, in seconds.
    pub seconds: f64,
    /// The shortest run.
    pub seconds_min: f64,
    /// How many runs there were.
    pub runs: usize,
    /// [`Case::bytes`] over the median.
    pub gb_s: f64,
    /// The same over the speed of a plain copy.
    pub of_copy: f64,
}

fn as_text<S: serde::Serializer>(dtype: &Dtype, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(dtype)
}

/// Positions and sizes, in pixels.
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 150.0;
const TOP: f64 = 88.0;
const PANEL: f64 = 220.0;
const GAP: f64 = 48.0;
const BOTTOM: f64 = 48.0;

/// The cases differ in lightness and mark too, so that they can be distinguished in grey.
fn colour(case: Case) -> &'static str {
    match case {
        Case::Norm => "#2166ac",
        Case::Unclipped => "#67a9cf",
        Case::Clipped => "#d7301f",
        Case::Value => "#e08214",
    }
}

/// The plot as an SVG document; `copy` and `read` are speeds in GB/s, as far as they were measured.
#[must_use]
pub fn draw(title: &str, rows: &[Row], (copy, read): (f64, Option<f64>)) -> String {
    let mut dtypes: Vec<Dtype> = Vec::new();
    for row in rows.iter().filter(|row| row.gb_s.is_finite()) {
        if !dtypes.contains(&row.dtype) {
            dtypes.push(row.dtype);
        }
    }
    let log = |elements: u64| (elements as f64).log2();
    let lowest = rows.iter().map(|row| log(row.elements)).fold(f64::INFINITY, f64::min);
    let highest = rows.iter().map(|row| log(row.elements)).fold(f64::NEG_INFINITY, f64::max);
    let (lowest, highest) = if highest > lowest { (lowest, highest) } else { (lowest - 1.0, highest + 1.0) };
    let x = |elements: u64| LEFT + (log(elements) - lowest) / (highest - lowest) * (RIGHT - LEFT);
    let fastest =
        rows.iter().map(|row| row.gb_s).chain([copy]).chain(read).filter(|y| y.is_finite()).fold(0.0, f64::max);
    let step = nice_step(fastest.max(1e-9) / 5.0);
    let most = (fastest.max(1e-9) * 1.04 / step).ceil() * step;

    let height = TOP + dtypes.len() as f64 * (PANEL + GAP) - GAP + BOTTOM;
    let mut svg = document(title, height);
    svg += r#"<text x="24" y="50">GB/s of the bytes that a case must move, against the number of elements; hollow: cut into many tensors</text>"#;
    svg.push('\n');
    for (panel, dtype) in dtypes.iter().enumerate() {
        let top = TOP + panel as f64 * (PANEL + GAP);
        let y = |speed: f64| top + PANEL * (1.0 - speed / most);
        let rows: Vec<_> = rows.iter().filter(|row| row.dtype == *dtype && row.gb_s.is_finite()).collect();
        axes(&mut svg, (top, step, most), (lowest, highest));
        let _ = writeln!(svg, r#"<text x="{LEFT}" y="{:.1}" font-weight="bold">{dtype}</text>"#, top - 8.0);
        // At the right end: the names, each at the height of its curve, but not on top of another.
        let mut names = vec![(y(copy), format!("copy {}", number(copy, 3)), "#333")];
        if let Some(read) = read.filter(|read| (y(*read) - y(copy)).abs() > 1.0) {
            names.push((y(read), format!("read {}", number(read, 3)), "#777"));
        }
        let copy_line = (copy, r##"stroke="#333" stroke-width="2""##);
        for (speed, style) in [copy_line].into_iter().chain(read.map(|read| (read, r##"stroke="#999""##))) {
            let at = y(speed);
            let _ = writeln!(
                svg,
                r#"<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1}" y2="{at:.1}" {style} stroke-dasharray="8 4"/>"#
            );
        }
        for case in CASES {
            let of_case: Vec<&Row> = rows.iter().copied().filter(|row| row.case == case).collect();
            let mut counts: Vec<_> = of_case.iter().map(|row| row.tensors).collect();
            counts.sort_unstable();
            counts.dedup();
            for tensors in counts {
                let mut points: Vec<&Row> = of_case.iter().copied().filter(|row| row.tensors == tensors).collect();
                points.sort_by_key(|row| row.elements);
                curve(
                    &mut svg,
                    case,
                    &points.iter().map(|row| (x(row.elements), y(row.gb_s), *row)).collect::<Vec<_>>(),
                );
            }
            let last = of_case.iter().max_by_key(|row| (row.tensors == 1, row.elements));
            names.extend(last.map(|row| (y(row.gb_s), case.name().to_owned(), colour(case))));
        }
        spread(&mut names, top, top + PANEL);
        for (at, name, colour) in names {
            let _ = writeln!(
                svg,
                r#"<text x="{:.1}" y="{:.1}" fill="{colour}">{}</text>"#,
                RIGHT + 14.0,
                at + 4.0,
                escaped(&name)
            );
        }
    }
    svg + "</svg>\n"
}

/// The curve of one case, with a mark for each point.
fn curve(svg: &mut String, case: Case, points: &[(f64, f64, &Row)]) {
    let colour = colour(case);
    let line: Vec<_> = points.iter().map(|(x, y, _)| format!("{x:.1},{y:.1}")).collect();
    if line.len() > 1 {
        let line = line.join(" ");
        let _ = writeln!(svg, r#"<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>"#);
    }
    for (x, y, row) in points {
        let fill = if row.tensors == 1 { colour } else { "#fff" };
        let style = format!(r#"fill="{fill}" stroke="{colour}" stroke-width="1.5""#);
        let (element, place) = match case {
            Case::Norm => ("circle", format!(r#"cx="{x:.1}" cy="{y:.1}" r="4""#)),
            Case::Unclipped => ("circle", format!(r#"cx="{x:.1}" cy="{y:.1}" r="2.5""#)),
            Case::Clipped => ("rect", format!(r#"x="{:.1}" y="{:.1}" width="7" height="7""#, x - 3.5, y - 3.5)),
            Case::Value => ("path", format!(r#"d="M{x:.1} {:.1}l4.5 8h-9z""#, y - 5.0)),
        };
        let what = format!(
            "{}, {} of {} in {}: {} GB/s",
            case.name(),
            size_label(row.elements),
            row.dtype,
            plural(row.tensors as u64, "tensor"),
            number(row.gb_s, 3)
        );
        let _ = writeln!(svg, "<{element} {place} {style}><title>{}</title></{element}>", escaped(&what));
    }
}

/// The grid of a panel, with its numbers.
fn axes(svg: &mut String, (top, step, most): (f64, f64, f64), (lowest, highest): (f64, f64)) {
    let bottom = top + PANEL;
    for tick in 0..=(most / step).round() as u32 {
        let speed = f64::from(tick) * step;
        let at = bottom - PANEL * speed / most;
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1}" y2="{at:.1}" stroke="#e5e5e5"/><text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"##,
            LEFT - 8.0,
            at + 4.0,
            number(speed, 4)
        );
    }
    // Powers of two, as many as have room for their names.
    let apart = ((highest - lowest) / 14.0).ceil().max(1.0) as u32;
    let first = lowest.ceil() as u32;
    for power in (first..=highest.floor() as u32).filter(|power| power.is_multiple_of(apart)) {
        let at = LEFT + (f64::from(power) - lowest) / (highest - lowest) * (RIGHT - LEFT);
        let _ = writeln!(
            svg,
            r##"<line x1="{at:.1}" x2="{at:.1}" y1="{top}" y2="{bottom}" stroke="#f0f0f0"/><text x="{at:.1}" y="{:.1}" text-anchor="middle">{}</text>"##,
            bottom + 16.0,
            size_label(1 << power)
        );
    }
}

/// 1, 2 or 5 times a power of ten, no less than `least`.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let found = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * power >= least * 0.999);
    found.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_numbers() {
        for (least, step) in
            [(0.9, 1.0), (1.0, 1.0), (1.1, 2.0), (4.0, 5.0), (6.0, 10.0), (640.0, 1000.0), (0.03, 0.05)]
        {
            assert!((nice_step(least) / step - 1.0).abs() < 1e-9, "{least}: {}", nice_step(least));
        }
    }
}
