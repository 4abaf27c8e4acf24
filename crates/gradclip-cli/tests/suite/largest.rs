//! Which gradients are the largest: the table and the plot of `gradclip norm`.

use std::path::{Path, PathBuf};

use crate::common::{EXAMPLE, Folder, Run, f32s, file, gradclip, shaped_file, text, well_formed};
use serde_json::json;

fn norm(input: &Path, more: &[&str]) -> Run {
    gradclip([&["norm", "--backend", "cpu", input.to_str().unwrap()], more].concat())
}

/// The rows of the table, header first, each as its words.
fn rows(run: &Run) -> Vec<Vec<&str>> {
    run.stdout.lines().skip_while(|line| !line.is_empty()).skip(1).map(|row| row.split_whitespace().collect()).collect()
}

fn every_dtype() -> Vec<u8> {
    let halves = |bits: [u16; 4]| bits.map(u16::to_le_bytes).concat();
    let wide = [0f64, -0.0, f64::MIN_POSITIVE / 4.0, 12.0].map(f64::to_le_bytes).concat();
    shaped_file(&[
        ("float64", "F64", &[2, 2], wide),
        ("empty", "F32", &[0], vec![]),
        ("float32", "F32", &[4], f32s(&[-0.0, 1e-45, 3.0, 0.0])),
        ("float16", "F16", &[4, 1], halves([0x8000, 0x0001, 0x4400, 0x0000])),
        ("bfloat16", "BF16", &[1, 4], halves([0x8000, 0x0001, 0x0000, 0x0000])),
        ("integer", "I64", &[1], vec![1; 8]),
    ])
}

#[test]
fn the_table() {
    let folder = Folder::new();
    let input = folder.write("in", every_dtype());
    let run = norm(&input, &[]).succeeded();
    let rows = rows(&run);
    assert_eq!(rows[0], ["norm", "share", "non-finite", "zeros", "largest", "5", "of", "5", "tensors"]);
    assert_eq!(rows[1], ["12", "85.2%", "0", "50%", "float64", "[2,", "2]", "float64"]);
    assert_eq!(rows[2][..5], ["4", "9.47%", "0", "50%", "float16"]);
    assert_eq!(rows[3][..5], ["3", "5.33%", "0", "50%", "float32"]);
    assert_eq!(rows[4][2..5], ["0", "75%", "bfloat16"]);
    assert_eq!(rows[5][..5], ["0", "0%", "0", "-", "empty"]);
    assert!(run.stdout.starts_with("total norm   13 (L2)\n"), "{run:?}");

    for (norm_type, total, header, share) in [
        ("1", "19.0000001 (L1)", "share", "63.2%"),
        ("inf", "12 (inf)", "of max", "100%"),
        ("3", "12.", "share", "95%"),
    ] {
        let run = norm(&input, &["--norm-type", norm_type, "--top", "1", "--grad-scale", "1"]).succeeded();
        assert!(run.stdout.starts_with(&format!("total norm   {total}")), "{run:?}");
        assert!(run.stdout.contains(header) && run.stdout.contains("largest 1 of 5 tensors"), "{run:?}");
        assert!(run.stdout.contains(&format!("        12 {share:>8} ")), "{run:?}");
    }
    assert!(!norm(&input, &["--top", "0"]).succeeded().stdout.contains("largest"));
    assert_eq!(norm(&input, &["--quiet"]).succeeded().stdout, "13\n");
}

#[test]
fn what_is_not_finite_comes_first() {
    let folder = Folder::new();
    let bad = [
        ("a", "F32", f32s(&[1e30, 0.0])),
        ("nan", "F32", f32s(&[f32::NAN, -f32::NAN, 0.0, f32::INFINITY])),
        ("inf", "F64", [f64::NEG_INFINITY, 1.0].map(f64::to_le_bytes).concat()),
        ("b", "F32", f32s(&[1e-30])),
    ];
    let input = folder.write("in", file(&bad));
    let run = norm(&input, &[]).succeeded();
    let rows: Vec<_> = rows(&run).into_iter().map(|row| row[..5].join(" ")).collect();
    let expected = ["NaN - 3 25% nan", "inf - 1 0% inf", "1e30 - 0 50% a", "1e-30 - 0 0% b"];
    assert_eq!(rows[1..], expected);
}

#[test]
fn other_scopes_list_their_own() {
    let folder = Folder::new();
    let input = folder.write("in", shaped_file(&[("w", "F32", &[2, 2], f32s(&[3.0, 4.0, 0.0, 12.0]))]));
    let run = norm(&input, &["--scope", "unit"]).succeeded();
    let expected =
        [&["norm", "share", "largest", "2", "of", "2", "units"][..], &["12", "85.2%", "w[1]"], &["5", "14.8%", "w[0]"]];
    assert_eq!(rows(&run), expected);
    let run = norm(&input, &["--scope", "example", "--top", "1"]).succeeded();
    assert_eq!(rows(&run)[1], ["12", "85.2%", "example", "1"]);
}

fn plotted(folder: &Folder, input: &Path, more: &[&str]) -> String {
    let out = folder.path("plot.svg");
    norm(input, &[&["--plot", out.to_str().unwrap(), "--force"], more].concat()).succeeded();
    let svg = String::from_utf8(folder.read("plot.svg")).unwrap();
    well_formed(&svg);
    svg
}

#[test]
fn the_plot_names_every_tensor() {
    let folder = Folder::new();
    let svg = plotted(&folder, Path::new(EXAMPLE), &["--norm-type", "inf"]);
    for label in ["emb.weight", "head.bias", "rnn.weight_hh_l0", "rnn.bias_ih_l1"] {
        assert!(svg.contains(&format!(">{label}</text>")) && svg.contains(&format!("<title>{label}: ")), "{label}");
    }
    assert!(svg.contains(">inf norms in lstm_grads.safetensors</text>"), "{svg}");
    assert!(svg.contains("11 tensors, total norm 0.1787") && svg.contains(">total</text>"), "{svg}");
    assert!(svg.contains("stroke-dasharray"));
}

#[test]
fn the_plot_of_awkward_tensors() {
    let folder = Folder::new();
    let long = format!("encoder.{}.weight", "block.".repeat(20));
    let tensors = [
        ("<&>\"'\n\u{1b}[31m\u{ffff}", "F32", f32s(&[1e-30])),
        ("zero", "F32", f32s(&[0.0; 2])),
        ("bad", "F32", f32s(&[f32::NAN, 1.0, f32::INFINITY])),
        (&long, "F32", f32s(&[1e30])),
        ("empty", "F32", vec![]),
    ];
    let svg = plotted(&folder, &folder.write("<in>", file(&tensors)), &["--quiet"]);
    assert!(svg.contains("L2 norms in &lt;in&gt;"), "{svg}");
    assert!(svg.contains(r"&lt;&amp;&gt;\&quot;\'\n\u{1b}[31m\u{ffff}"), "{svg}");
    assert!(svg.contains(">2 non-finite</text>") && svg.contains("<title>bad: 2 non-finite</title>"), "{svg}");
    assert!(svg.contains("<title>zero: 0</title>") && svg.contains("<title>empty: 0</title>"), "{svg}");
    assert!(svg.contains('…') && svg.contains(&format!("<title>{long}: 1e30</title>")), "{svg}");
    // A total that is not finite has no place on the axis.
    assert!(svg.contains("total norm NaN") && !svg.contains("stroke-dasharray"), "{svg}");
    plotted(&folder, &folder.write("none", file(&[])), &["--json"]);
    plotted(&folder, &folder.write("zeros", file(&[("zero", "F32", f32s(&[0.0]))])), &["--top", "0"]);
}

#[test]
fn the_plot_of_many_tensors_thins_its_labels() {
    let folder = Folder::new();
    let names: Vec<_> = (0..500).map(|i| format!("layer.{i}.weight")).collect();
    let value = |i| if i == 250 { f32::NAN } else { 1.0 };
    let tensors: Vec<_> = names.iter().enumerate().map(|(i, name)| (name.as_str(), "F32", f32s(&[value(i)]))).collect();
    let svg = plotted(&folder, &folder.write("in", file(&tensors)), &[]);
    let labels = names.iter().filter(|name| svg.contains(&format!(">{name}</text>"))).count();
    assert!((50..=150).contains(&labels), "{labels}");
    assert!(names.iter().all(|name| svg.contains(&format!("<title>{name}: "))));
    assert!(svg.contains(">layer.250.weight</text>"), "what is not finite keeps its name");
}

/// Where the plot may not go.
#[test]
fn the_plot_replaces_nothing() {
    let folder = Folder::new();
    let input = folder.write("in", file(&[("a", "F32", f32s(&[1.0]))]));
    let before = folder.read("in");
    let plot = |path: PathBuf, more: &[&str]| norm(&input, &[&["--plot", path.to_str().unwrap()], more].concat());
    folder.write("mine.svg", "mine");
    plot(folder.path("mine.svg"), &[]).failed(1, &["mine.svg: exists already", "--force"]);
    plot(folder.path("in"), &["--force"]).failed(2, &["own input"]);
    plot(folder.path("none/a.svg"), &[]).failed(1, &["not a folder"]);
    plot(folder.path(".."), &[]).failed(2, &["must name a file"]);
    assert_eq!((folder.names(), folder.read("in")), (vec!["in".to_owned(), "mine.svg".to_owned()], before));
    assert_eq!(folder.read("mine.svg"), b"mine");
    plot(folder.path("mine.svg"), &["--force"]).succeeded();
    assert!(folder.read("mine.svg").starts_with(b"<?xml"));
}

/// Magnitudes by powers of two, over all files, and what narrower formats would lose.
#[test]
fn a_histogram() {
    let folder = Folder::new();
    let values = f32s(&[0.0, 0.75, -0.5, 1e-9, 1e5, f32::NAN]);
    let half = [0x3c00u16, 0x8000].iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let input = folder.write("in", file(&[("a", "F32", values), ("b", "F16", half)]));
    let args = ["norm", text(&input), "--histogram", "--backend", "cpu"];
    let object = gradclip(args.iter().chain(&["--json"])).succeeded().json();
    let lost = |zero, infinite| json!({ "zero": zero, "infinite": infinite });
    let expected = json!({
        "zeros": 2, "non_finite": 1, "by_exponent": { "-30": 1, "-1": 2, "0": 1, "16": 1 },
        "lost": {
            "float16": lost(1, 1), "bfloat16": lost(0, 0), "float8_e4m3": lost(1, 1), "float8_e5m2": lost(1, 1),
        },
    });
    assert_eq!(object["histogram"], expected);
    let run = gradclip(args).succeeded();
    for line in
        ["12.5%  not finite", "25%  2^-1 .. 2^0", "25%  0 ", "12.5%    12.5%  as float16", "0%       0%  as bfloat16"]
    {
        assert!(run.stdout.contains(line), "{line}: {run:?}");
    }
    let other = folder.write("other", file(&[("c", "F64", vec![0; 16])]));
    let both = ["norm", text(&input), text(&other), "--histogram", "--json", "--backend", "cpu"];
    assert_eq!(gradclip(both).succeeded().json()["histogram"]["zeros"], json!(4));
    let object = gradclip(args.iter().chain(&["--json", "--only", "b"])).succeeded().json();
    assert_eq!(object["histogram"]["by_exponent"], json!({ "0": 1 }));
}
