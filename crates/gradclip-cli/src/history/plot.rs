//! A plot of norms over steps: a curve for the total and one for each of the largest groups, on a logarithmic axis. Spikes and
//! steps with non-finite elements are marked.

use std::fmt::Write;

use gradclip_common::plot::{WIDTH, document, escaped, spread};
use gradclip_common::text::{number, shown};

use super::Step;

/// Positions and sizes, in pixels.
const LEFT: f64 = 72.0;
const RIGHT: f64 = WIDTH - 200.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = TOP + 360.0;
/// The longest name of a group, in characters.
const LONGEST: usize = 26;

const TOTAL: &str = "#333";
const GROUPS: [&str; 6] = ["#2166ac", "#e08214", "#67a9cf", "#7b3294", "#5aae61", "#b15928"];
const BAD: &str = "#d7301f";

/// The plot as an SVG document. `largest` are the groups to draw, and a z-score above `spike` is a spike.
pub(super) fn draw(title: &str, steps: &[Step], names: &[String], largest: &[usize], spike: f64) -> String {
    let totals: Vec<_> = steps.iter().map(|step| Some(step.total)).collect();
    let mut curves = vec![("total".to_owned(), TOTAL, totals)];
    for (&group, colour) in largest.iter().zip(GROUPS) {
        curves.push((shown(&names[group]), colour, steps.iter().map(|step| step.groups[group]).collect()));
    }
    let positive = |norm: &f64| norm.is_finite() && *norm > 0.0;
    let norms: Vec<_> =
        curves.iter().flat_map(|(.., norms)| norms.iter().flatten().copied()).filter(positive).collect();
    let least = norms.iter().copied().fold(f64::INFINITY, f64::min).log10();
    let most = norms.iter().copied().fold(0.0, f64::max).log10();
    let (lowest, highest) =
        if norms.is_empty() { (-1.0, 0.0) } else { (least.floor(), most.ceil().max(least.floor() + 1.0)) };
    let y = |norm: f64| BOTTOM - (norm.log10() - lowest) / (highest - lowest) * (BOTTOM - TOP);
    let (first, last) = (steps.first().map_or(0, |step| step.number), steps.last().map_or(0, |step| step.number));
    let x = |step: u64| LEFT + (step - first) as f64 / (last - first).max(1) as f64 * (RIGHT - LEFT);

    let mut svg = document(title, BOTTOM + 64.0);
    svg += r#"<text x="24" y="50">norm against step; triangle: spike; cross: elements that are not finite</text>"#;
    svg.push('\n');
    let decades = highest - lowest;
    let apart = (decades / 10.0).ceil();
    for i in 0..=(decades / apart) as u32 {
        let power = lowest + apart * f64::from(i);
        let at = BOTTOM - (power - lowest) / decades * (BOTTOM - TOP);
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1}" y2="{at:.1}" stroke="#e5e5e5"/><text x="{:.1}" y="{:.1}" text-anchor="end">1e{power}</text>"##,
            LEFT - 8.0,
            at + 4.0
        );
    }
    for tick in ticks(first, last) {
        let _ = writeln!(
            svg,
            r##"<line x1="{0:.1}" x2="{0:.1}" y1="{TOP}" y2="{BOTTOM}" stroke="#f0f0f0"/><text x="{0:.1}" y="{1:.1}" text-anchor="middle">{tick}</text>"##,
            x(tick),
            BOTTOM + 18.0
        );
    }
    let _ = writeln!(
        svg,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">step</text>"#,
        (LEFT + RIGHT) / 2.0,
        BOTTOM + 40.0
    );

    let mut labels = Vec::new();
    // The total is drawn last, on top.
    for (name, colour, norms) in curves.iter().rev() {
        let width = if *colour == TOTAL { 2.0 } else { 1.2 };
        let points = steps.iter().zip(norms).map(|(step, norm)| Some((x(step.number), y(norm.filter(positive)?))));
        let points: Vec<_> = points.collect();
        // A gap where there is no norm to draw.
        for run in points.split(Option::is_none).filter(|run| !run.is_empty()) {
            let run: Vec<_> = run.iter().flatten().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let line = run.join(" ");
            let _ = writeln!(
                svg,
                r#"<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round" stroke-linecap="round"/>"#
            );
            if let [only] = &run[..] {
                let (cx, cy) = only.split_once(',').unwrap_or_default();
                let _ = writeln!(svg, r#"<circle cx="{cx}" cy="{cy}" r="{width}" fill="{colour}"/>"#);
            }
        }
        labels.extend(points.iter().flatten().last().map(|(_, y)| (*y, abbreviated(name), *colour)));
    }
    for step in steps {
        let at = x(step.number);
        if let Some(found) = &step.non_finite {
            let what = escaped(&shown(&format!("step {}: {found}", step.number)));
            let path = format!("M{:.1} {:.1}l8 8m0 -8l-8 8", at - 4.0, TOP - 16.0);
            let _ = writeln!(
                svg,
                r#"<path d="{path}" stroke="{BAD}" stroke-width="1.5" fill="none"><title>{what}</title></path>"#
            );
        }
        if let Some(z) = step.z.filter(|z| *z > spike) {
            let what = format!("step {}: {}, z {}", step.number, number(step.total, 6), number(z, 3));
            let path = format!("M{at:.1} {:.1}l-5 -9h10z", y(step.total) - 3.0);
            let _ = writeln!(svg, r#"<path d="{path}" fill="{BAD}"><title>{}</title></path>"#, escaped(&what));
        }
    }
    spread(&mut labels, TOP, BOTTOM);
    for (at, name, colour) in labels {
        let _ = writeln!(
            svg,
            r#"<text x="{:.1}" y="{:.1}" fill="{colour}">{}</text>"#,
            RIGHT + 10.0,
            at + 4.0,
            escaped(&name)
        );
    }
    svg + "</svg>\n"
}

/// Round numbers of steps, at most nine of them.
fn ticks(first: u64, last: u64) -> impl Iterator<Item = u64> {
    let least = (last - first).div_ceil(8).max(1);
    let mut apart = 10u64.pow(least.ilog10());
    if let Some(digit) = [1, 2, 5, 10].into_iter().find(|digit| digit * apart >= least) {
        apart *= digit;
    }
    (first.div_ceil(apart)..=last / apart).map(move |i| i * apart)
}

/// Shortened at its beginning, since names differ at their ends.
fn abbreviated(name: &str) -> String {
    match name.char_indices().nth_back(LONGEST - 1) {
        Some((from, _)) if from > 0 => format!("…{}", &name[from..]),
        _ => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::ticks;

    #[test]
    fn steps_have_round_ticks() {
        for (first, last, expected) in [
            (0, 0, vec![0]),
            (7, 7, vec![7]),
            (0, 8, vec![0, 1, 2, 3, 4, 5, 6, 7, 8]),
            (100, 2000, vec![500, 1000, 1500, 2000]),
        ] {
            assert_eq!(ticks(first, last).collect::<Vec<_>>(), expected);
        }
        assert!(ticks(0, u64::MAX / 32).count() < 12);
    }
}
