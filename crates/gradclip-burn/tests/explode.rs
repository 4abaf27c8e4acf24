//! The example `explode` as a person runs it: every choice, kills, bad checkpoints, and whether its story is true.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

#[path = "../examples/explode/main.rs"]
#[allow(dead_code, reason = "its `main`")]
mod explode;

const ARGUMENTS: &str = "EXPLODE_TEST_ARGUMENTS";
const TINY: [&str; 8] = ["--hidden", "8", "--unroll", "6", "--batch-size", "2", "--z-warm-up", "3"];

/// The program in a process of its own, which this binary becomes when the tests below start it.
#[test]
#[ignore = "the program itself, which the other tests start"]
fn the_program() {
    if let Ok(arguments) = std::env::var(ARGUMENTS) {
        let code = explode::run(arguments.split('\n').map(Into::into));
        std::process::exit(code.into());
    }
}

fn command(out: &Path, arguments: &[&str]) -> Command {
    let out = out.to_str().expect("a path in UTF-8");
    let arguments = [&["explode", "--out", out], arguments].concat().join("\n");
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["--exact", "the_program", "--ignored", "--nocapture"]).env(ARGUMENTS, arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(out: &Path, arguments: &[&str]) -> Output {
    command(out, arguments).output().expect("the program starts")
}

/// The figures of a run that must succeed.
fn figures(out: &Path, arguments: &[&str]) -> Value {
    let output = run(out, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(out.join("explode.json")).expect("the figures")).expect("JSON")
}

/// The error output of a run that must fail.
fn refusal(out: &Path, arguments: &[&str], code: i32) -> String {
    let output = run(out, arguments);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
    stderr
}

fn runs(figures: &Value) -> &[Value] {
    let runs = figures["runs"].as_array().expect("a list");
    assert_eq!(runs.iter().map(|run| &run["clipping"]).collect::<Vec<_>>(), ["none", "value", "norm", "zclip"]);
    runs
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Every file below a folder.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.insert(path.display().to_string(), fs::read(&path).expect("a file"));
        }
    }
    files
}

#[test]
fn every_choice_trains_with_finite_losses() {
    let mut choices = Vec::new();
    for activation in ["sigmoid", "tanh", "relu", "leaky-relu", "elu"] {
        choices.push(vec!["--activation", activation]);
    }
    for optimizer in ["sgd", "adagrad", "rmsprop", "adam"] {
        choices.push(vec!["--optimizer", optimizer]);
        choices.push(vec!["--optimizer", optimizer, "--folded"]);
        for loss in ["squared", "absolute"] {
            choices.push(vec!["--task", "regression", "--loss", loss, "--optimizer", optimizer]);
        }
    }
    let (mut weights, mut folded) = (BTreeSet::new(), BTreeSet::new());
    for choice in &choices {
        let folder = folder();
        let arguments = [&TINY[..], &["--steps", "8", "--lr", "0.01"], choice].concat();
        let figures = figures(folder.path(), &arguments);
        for run in runs(&figures) {
            assert_eq!((&run["steps"], &run["diverged_at"]), (&8.into(), &Value::Null), "{choice:?}");
            for what in ["loss", "norm"] {
                let values = run[what].as_array().expect("a list");
                assert_eq!(values.len(), 8, "{choice:?}");
                assert!(values.iter().all(|value| value.as_f64().is_some_and(|v| v.is_finite() && v > 0.0)), "{run}");
            }
            assert!(run["validation"][1][1].is_number(), "{run}");
        }
        // Each choice is heard. ReLU and SGD are the defaults, and some of the library's steps have the bits of burn's.
        let of: &mut BTreeSet<_> = if choice.contains(&"--folded") { &mut folded } else { &mut weights };
        of.insert(runs(&figures)[0]["weights"].to_string());
    }
    assert_eq!((folded.len(), weights.len()), (4, choices.len() - 4 - 1));
    assert!(!folded.is_subset(&weights));
}

#[cfg(unix)]
#[test]
fn killed_and_resumed_reaches_the_same_weights() {
    use std::os::unix::process::ExitStatusExt;

    let mut resumed_midway = 0;
    let optimizers = [("sgd", false), ("adagrad", false), ("rmsprop", false), ("adam", false), ("adam", true)];
    for (i, (optimizer, folded)) in optimizers.into_iter().enumerate() {
        let task = ["text", "regression"][i % 2];
        let arguments = ["--steps", "120", "--save-every", "7", "--optimizer", optimizer, "--task", task];
        let folded: &[_] = if folded { &["--folded"] } else { &[] };
        let arguments = [&TINY[..], &["--lr", "0.02"], &arguments, folded].concat();
        let whole = folder();
        let expected = figures(whole.path(), &arguments);
        assert!(runs(&expected)[3]["clipped"] != 0, "ZClip never clipped: its state is not tried");

        let stopped = folder();
        let began = Instant::now();
        let mut kills = 0;
        let mut resume: &[&str] = &[];
        loop {
            let mut child =
                command(stopped.path(), &[&arguments, resume].concat()).spawn().expect("the program starts");
            let saved = stopped.path().join("checkpoints/zclip.checkpoint");
            while !saved.exists() && child.try_wait().expect("a child").is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            // As random as the scheduler and the clock.
            let random = u64::from(began.elapsed().subsec_nanos()) / 7 % 200;
            std::thread::sleep(Duration::from_millis(20 + random));
            child.kill().expect("a child");
            let output = child.wait_with_output().expect("a child");
            let began_anew = String::from_utf8_lossy(&output.stdout).contains("step 0, saved");
            resumed_midway += usize::from(kills > 0 && !began_anew);
            if output.status.signal().is_none() {
                let stderr = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{optimizer}: {stderr}");
                break;
            }
            kills += 1;
            resume = &["--resume"];
            if kills == 3 {
                let output = run(stopped.path(), &[&arguments, resume].concat());
                assert!(output.status.success(), "{optimizer}: {}", String::from_utf8_lossy(&output.stderr));
                break;
            }
        }
        assert!(kills > 0, "{optimizer}: was never killed");
        let got = fs::read(stopped.path().join("explode.json")).expect("the figures");
        let got: Value = serde_json::from_slice(&got).expect("JSON");
        for (got, expected) in runs(&got).iter().zip(runs(&expected)) {
            assert_eq!(got, expected, "{optimizer}, killed {kills} times");
        }
    }
    assert!(resumed_midway > 0, "every resumed run began anew");
}

#[test]
fn bad_checkpoints_are_refused_and_nothing_is_written() {
    let folder = folder();
    let out = folder.path();
    let arguments = [&TINY[..], &["--steps", "6", "--save-every", "3"]].concat();
    figures(out, &arguments);
    let path = out.join("checkpoints/norm.checkpoint");
    let good = fs::read(&path).expect("a checkpoint");
    let resume = |more: &[&str], code, expected: &[&str]| {
        let before = files(out);
        let stderr = refusal(out, &[&arguments, more].concat(), code);
        for words in expected {
            assert!(stderr.contains(words), "{words} is missing: {stderr}");
        }
        assert!(stderr.lines().count() <= 2, "{stderr}");
        assert!(files(out) == before, "files changed: {stderr}");
    };

    resume(&[], 1, &["holds checkpoints", "--resume", "--force"]);
    resume(&["--resume", "--steps", "4"], 1, &["has done 6 steps"]);
    for (option, value) in [("--hidden", "9"), ("--activation", "tanh"), ("--seed", "2"), ("--max-norm", "0.5")] {
        resume(&["--resume", option, value], 1, &["none.checkpoint was made with", option, value]);
    }
    for length in [0, 7, 31, 40, good.len() / 2, good.len() - 1] {
        fs::write(&path, &good[..length]).expect("written");
        resume(&["--resume", "--steps", "9"], 1, &["norm.checkpoint is "]);
    }
    for place in [3, 9, 200, good.len() - 300, good.len() - 1] {
        let mut bad = good.clone();
        bad[place] ^= 4;
        fs::write(&path, &bad).expect("written");
        resume(&["--resume", "--steps", "9"], 1, &["norm.checkpoint is "]);
    }
    fs::copy(out.join("checkpoints/value.checkpoint"), &path).expect("copied");
    resume(&["--resume", "--steps", "9"], 1, &["norm.checkpoint is of the run with value clipping"]);

    // The good one again: all that was refused has done no harm.
    fs::write(&path, &good).expect("written");
    let went_on = figures(out, &[&arguments[..], &["--resume", "--steps", "9"]].concat());
    let whole = self::folder();
    let expected = figures(whole.path(), &[&arguments[..], &["--steps", "9"]].concat());
    for (got, expected) in runs(&went_on).iter().zip(runs(&expected)) {
        assert_eq!(got["weights"], expected["weights"]);
    }
    fs::remove_dir_all(out.join("checkpoints")).expect("removed");
    resume(&["--resume"], 1, &["no checkpoint to resume"]);
}

#[test]
fn bad_options_are_usage_errors() {
    let folder = folder();
    for (bad, expected) in [
        (["--lr", "0"], "above 0"),
        (["--lr", "nan"], "above 0"),
        (["--lr-decay", "1.5"], "at most 1"),
        (["--batch-size", "0"], "above 0"),
        (["--unroll", "1000000"], "--unroll"),
        (["--max-norm", "inf"], "above 0"),
        (["--z-warm-up", "0"], "0"),
        (["--loss", "squared"], "cross-entropy"),
        (["--activation", "cube"], "possible values"),
    ] {
        let stderr = refusal(folder.path(), &bad, 2);
        assert!(stderr.contains(expected), "{bad:?}: {stderr}");
    }
    let stderr = refusal(folder.path(), &["--task", "regression", "--loss", "cross-entropy"], 2);
    assert!(stderr.contains("squared or absolute"), "{stderr}");
    assert_eq!(files(folder.path()).len(), 0);
}

#[test]
fn without_clipping_it_diverges_and_with_it_learns() {
    let folder = folder();
    let figures = figures(
        folder.path(),
        &["--hidden", "32", "--unroll", "80", "--batch-size", "4", "--gain", "1.4", "--lr", "0.1", "--steps", "80"],
    );
    let [none, _, norm, _] = runs(&figures) else { panic!("four runs") };
    assert!(none["diverged_at"].is_number(), "without clipping it did not diverge: {none}");
    assert_eq!(norm["diverged_at"], Value::Null);
    let (first, last) = (norm["loss"][0].as_f64().expect("a loss"), norm["validation"][1][1].as_f64());
    assert!(last.is_some_and(|last| last < first - 0.5), "{first} to {last:?}");

    let svg = fs::read_to_string(folder.path().join("explode.svg")).expect("the picture");
    well_formed(&svg);
    for words in
        ["no clipping", "value clipping", "norm clipping", "ZClip", "global gradient norm", "not finite at step"]
    {
        assert!(svg.contains(words), "{words} is missing");
    }
    assert_eq!(svg.matches("<polyline ").count(), 8);
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
}

/// Tags close in order, and nothing is bare that XML wants escaped.
fn well_formed(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg.strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>").expect("a declaration");
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains(['>', '&']), "{}", &rest[..start]);
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "{tag}");
        } else if !tag.ends_with('/') {
            open.push(tag.split(' ').next().expect("a name"));
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "{open:?} {rest}");
}
