//! Loss and gradient norm of the runs against the step, on logarithmic axes.

use std::fmt::Write;

use super::settings::Clipping;
use super::train::Run;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 700.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 24.0;
/// Top and bottom of each panel.
const PANELS: [(f64, f64); 2] = [(84.0, 354.0), (396.0, 650.0)];
/// How much later a point of a line begins than the one before, at least; it stands for the steps between.
const PITCH: f64 = 1.03;
/// Losses beyond this are drawn at the edge, or those that explode would leave no room for those that fall.
const MOST_LOSS: f32 = 100.0;

fn colour(clipping: Clipping) -> &'static str {
    match clipping {
        Clipping::None => "#d7301f",
        Clipping::Value => "#e08214",
        Clipping::Norm => "#2166ac",
        Clipping::Zclip => "#1b7837",
    }
}

/// An SVG document, on a white ground of its own, so that it can be read on any.
pub(crate) fn draw(title: &str, subtitle: &str, runs: &[Run]) -> String {
    let mut svg = format!(
        r##"<?xml version="1.0" encoding="UTF-8"?>
<svg xmlns="http://www.w3.org/2000/svg" version="1.1" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#333">
<rect width="100%" height="100%" rx="6" fill="#fff"/>
<text x="24" y="28" font-size="16" font-weight="bold">{title}</text>
<text x="24" y="46" fill="#666">{subtitle}</text>
"##
    );
    let steps = runs.iter().map(Run::steps).max().unwrap_or(0).max(2);
    let losses: Vec<_> =
        runs.iter().map(|run| run.figures.loss.iter().map(|loss| Some(loss.min(MOST_LOSS))).collect()).collect();
    let norms: Vec<_> = runs.iter().map(|run| run.figures.norm.clone()).collect();
    legend(&mut svg, runs);
    panel(&mut svg, PANELS[0], "loss", steps, runs, &losses);
    panel(&mut svg, PANELS[1], "global gradient norm", steps, runs, &norms);
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    let _ = writeln!(svg, r#"<text x="{middle}" y="{}" text-anchor="middle">step</text>"#, HEIGHT - 14.0);
    svg + "</svg>\n"
}

fn legend(svg: &mut String, runs: &[Run]) {
    for (i, run) in runs.iter().enumerate() {
        let (x, colour) = (LEFT + 220.0 * i as f64, colour(run.clipping));
        let ended = match (run.figures.diverged_at, run.figures.validation.last()) {
            (Some(step), _) => format!("diverged at step {step}"),
            (None, Some((_, Some(loss)))) => format!("held out {loss:.3}"),
            _ => String::new(),
        };
        let _ = writeln!(
            svg,
            r#"<path d="M{x} 66h22" stroke="{colour}" stroke-width="3"/><text x="{}" y="70"><tspan font-weight="bold">{}</tspan> {ended}</text>"#,
            x + 28.0,
            run.clipping.name()
        );
    }
}

fn panel(
    svg: &mut String,
    (top, bottom): (f64, f64),
    title: &str,
    steps: usize,
    runs: &[Run],
    values: &[Vec<Option<f32>>],
) {
    let positive = |value: &f32| value.is_finite() && *value > 0.0;
    let logs = values.iter().flatten().flatten().filter(|v| positive(v)).map(|v| f64::from(*v).log10());
    let (least, most) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), v| (least.min(v), most.max(v)));
    let (least, most) = if least <= most { (least, most.max(least + 0.3)) } else { (-1.0, 0.0) };
    // Steps from 1: what explodes does so in the first few of them.
    let x = |step: f64| LEFT + step.ln() / (steps as f64).ln() * (WIDTH - LEFT - RIGHT);
    let y = |log: f64| bottom - (log - least) / (most - least) * (bottom - top);

    for (value, strong) in ticks(least, most) {
        let (at, grey) = (y(value.log10()), if strong { "#ccc" } else { "#eee" });
        let _ = writeln!(svg, r#"<path d="M{LEFT} {at:.1}H{}" stroke="{grey}"/>"#, WIDTH - RIGHT);
        if strong {
            let label = if (0.01..1e4).contains(&value) { format!("{value}") } else { format!("{value:e}") };
            let _ = writeln!(svg, r#"<text x="{}" y="{:.1}" text-anchor="end">{label}</text>"#, LEFT - 6.0, at + 4.0);
        }
    }
    for (step, _) in ticks(0.0, (steps as f64).log10()) {
        let at = x(step);
        let _ = writeln!(svg, r##"<path d="M{at:.1} {top}V{bottom}" stroke="#eee"/>"##);
        if ["1", "2", "5"].iter().any(|digit| format!("{step}").starts_with(digit)) {
            let _ = writeln!(svg, r#"<text x="{at:.1}" y="{}" text-anchor="middle">{step}</text>"#, bottom + 16.0);
        }
    }
    let middle = (top + bottom) / 2.0;
    let _ = writeln!(
        svg,
        r#"<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle" font-weight="bold">{title}</text>"#
    );

    // The first run on top: it is the shortest.
    for (run, values) in runs.iter().zip(values).rev() {
        let colour = colour(run.clipping);
        let (mut upper, mut lower, mut line) = (String::new(), Vec::new(), String::new());
        let mut last = None;
        let mut start = 0;
        while start < values.len() {
            let end = ((start as f64 * PITCH) as usize).clamp(start + 1, values.len());
            let (chunk, middle) = (&values[start..end], (start + 1 + end) as f64 / 2.0);
            start = end;
            let logs: Vec<_> = chunk.iter().flatten().filter(|v| positive(v)).map(|v| f64::from(*v).log10()).collect();
            if logs.is_empty() {
                continue;
            }
            let at = x(middle);
            let (least, most) =
                logs.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, m), v| (l.min(*v), m.max(*v)));
            let mean = y(logs.iter().sum::<f64>() / logs.len() as f64);
            let _ = write!(upper, "{at:.1},{:.1} ", y(most));
            lower.push(format!("{at:.1},{:.1}", y(least)));
            let _ = write!(line, "{at:.1},{mean:.1} ");
            last = Some((at, mean));
        }
        lower.reverse();
        let _ = writeln!(
            svg,
            r#"<polygon points="{upper}{}" fill="{colour}" fill-opacity="0.18"/><polyline points="{}" fill="none" stroke="{colour}" stroke-width="1.8"/>"#,
            lower.join(" "),
            line.trim_end()
        );
        if let (Some(step), Some((x, y))) = (run.figures.diverged_at, last) {
            let _ = writeln!(
                svg,
                r#"<path d="M{x:.1} {y:.1}m-5 -5l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2.5"/><text x="{:.1}" y="{:.1}" fill="{colour}" font-weight="bold">not finite at step {step}</text>"#,
                x + 10.0,
                y + 16.0
            );
        }
    }
}

/// Where lines go between two powers of ten, and which of them are named: powers, and what lies between them where
/// there are few.
fn ticks(least: f64, most: f64) -> Vec<(f64, bool)> {
    let apart = ((most - least) / 8.0).ceil().max(1.0) as i32;
    let few = most - least < 2.0;
    let powers = least.floor() as i32..=most.ceil() as i32;
    let all = powers.flat_map(|power| (1..10).map(move |digit| (power, digit)));
    let all = all.filter(|(power, digit)| *digit == 1 && power % apart == 0 || apart == 1);
    let all = all.map(|(power, digit)| {
        let strong = digit == 1 || few && matches!(digit, 2 | 5) || few && most - least < 1.0;
        (format!("{digit}e{power}").parse().unwrap_or(1.0), strong)
    });
    all.filter(|(value, _): &(f64, bool)| (least..=most).contains(&value.log10())).collect()
}
