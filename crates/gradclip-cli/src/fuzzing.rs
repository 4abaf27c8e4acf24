//! The functions that fuzzing calls. Each takes any bytes, and panics if the program breaks a promise on them. The targets in
//! `fuzz/` call them, and so does a test, for each case in `fuzz/corpus`.

use std::collections::HashSet;
use std::path::Path;
use std::{fs, str};

use clap::Parser;
use gradclip::{Clip, Clipper, Error, Mode, TensorMut, UnitAxis};
use gradclip_common::header::{self, Entry};
use safetensors::SafeTensors;

use crate::args::{Cli, Command};
use crate::description::{measuring, norm_name};
use crate::failure::Failure;
use crate::input::Input;
use crate::layout::{Content, FileLayout};

/// A file. A file that is accepted is consistent, and read as the crate `safetensors` reads it.
pub fn file(bytes: &[u8]) {
    let reference = SafeTensors::deserialize(bytes);
    let (entries, metadata) = match header::parse(bytes) {
        Ok(accepted) => accepted,
        Err(problem) => {
            assert!(!problem.is_empty());
            // Stricter on purpose: names are unique.
            assert!(reference.is_err() || problem.contains("twice"), "{problem}");
            return;
        }
    };
    let reference = reference.expect("other readers accept it");
    let start = check_entries(&entries, bytes.len() as u64);
    assert_eq!(reference.len(), entries.len());
    for entry in &entries {
        let (name, view) = (&entry.name, reference.tensor(&entry.name).expect("it is there"));
        let found = (entry.kind, &entry.shape[..], &bytes[entry.range()]);
        assert_eq!((view.dtype(), view.shape(), view.data()), found, "{name}");
    }

    // Its header can be written again.
    let relative = |of: &Entry| Entry { bytes: of.bytes.start - start..of.bytes.end - start, ..of.clone() };
    let relative: Vec<_> = entries.iter().map(relative).collect();
    let mut again = header::compose(relative.iter(), metadata.as_deref());
    again.extend_from_slice(&bytes[start as usize..]);
    let (read, metadata_read) = header::parse(&again).expect("what is written can be read");
    assert_eq!(metadata_read, metadata);
    assert_eq!(read.len(), entries.len());
    let shift = again.len() as isize - bytes.len() as isize;
    for (a, b) in entries.iter().zip(&read) {
        assert_eq!((&a.name, a.kind, &a.shape, a.dtype), (&b.name, b.kind, &b.shape, b.dtype));
        assert_eq!(a.range().start as isize + shift, b.range().start as isize);
    }
}

/// Checks that a file of this layout can be read again, and has so many gradients.
fn check_written(layout: &FileLayout<'_>, gradients: usize) {
    let mut written = layout.blocks().collect::<Vec<_>>().concat();
    assert_eq!(written.len() as u64, layout.len());
    let (entries, _) = header::parse(&written).expect("what is written can be read");
    check_entries(&entries, written.len() as u64);
    assert_eq!(layout.tensors_in(&mut written).expect("they fit").len(), gradients);
}

/// Checks that entries have unique names and cover a file from the end of its header, which is returned.
fn check_entries(entries: &[Entry], length: u64) -> u64 {
    let mut names = HashSet::new();
    let start = entries.first().map_or(length, |entry| entry.bytes.start);
    let mut end = start;
    for Entry { name, kind, dtype, shape, bytes, .. } in entries {
        assert!(names.insert(name), "{name} twice");
        assert_eq!(bytes.start, end, "{name} begins where the one before ends");
        let bits = shape.iter().fold(kind.bitsize() as u128, |bits, n| bits.saturating_mul(*n as u128));
        assert_eq!(bits, u128::from(bytes.end - bytes.start) * 8, "{name}");
        assert!(dtype.is_none_or(|dtype| dtype.size() * 8 == kind.bitsize()));
        end = bytes.end;
    }
    assert_eq!(end, length);
    start
}

/// The names of the index and its shards.
const SET: [&str; 3] = ["set.safetensors.index.json", "a", "b"];

/// An index and two shards: the lengths of the first two, of 2 bytes each, then the three of them.
pub fn index(data: &[u8]) {
    let Some((lengths, rest)) = data.split_first_chunk::<4>() else { return };
    let length = |at: usize| usize::from(u16::from_le_bytes([lengths[at], lengths[at + 1]]));
    let (text, rest) = rest.split_at(length(0).min(rest.len()));
    let (a, b) = rest.split_at(length(2).min(rest.len()));
    thread_local! {
        static FOLDER: tempfile::TempDir = tempfile::tempdir().expect("a temporary folder");
    }
    FOLDER.with(|folder| {
        for (name, bytes) in SET.iter().zip([text, a, b]) {
            fs::write(folder.path().join(name), bytes).expect("it is written");
        }
        set(&folder.path().join(SET[0]), &[a, b]);
    });
}

fn set(path: &Path, shards: &[&[u8]]) {
    let input = match Input::open(path) {
        Ok(input) => input,
        Err(failure) => {
            // A file must not send control characters to a terminal.
            assert!(failure.exit_code() == 1 && !failure.to_string().contains(char::is_control), "{failure}");
            return;
        }
    };
    let mut names = HashSet::new();
    for file in &input.files {
        check_entries(&file.entries, file.bytes().len() as u64);
        assert!(file.entries.iter().all(|entry| names.insert(&entry.name)), "a tensor in two shards");
        assert!(shards.contains(&file.bytes()));
        let copy = FileLayout::copy(file);
        assert_eq!(copy.len(), file.bytes().len() as u64);
        assert_eq!(copy.blocks().collect::<Vec<_>>().concat(), file.bytes());
        let mut end = 0;
        for piece in copy.pieces(16) {
            assert_eq!(
                (piece.offset, piece.bytes),
                (end, &file.bytes()[end as usize..end as usize + piece.bytes.len()])
            );
            end += piece.bytes.len() as u64;
        }
        assert_eq!(end, copy.len());
        let widened = FileLayout::new(file, Content::Widened).expect("at most twice as long");
        check_written(&widened, copy.gradients());
        // Sums may be larger than the file if there are no examples.
        if let Ok(sums) = FileLayout::sums(file)
            && sums.len() < 1 << 20
        {
            check_written(&sums, copy.gradients());
        }
    }
    let tensors = match input.tensors() {
        Ok(tensors) => tensors,
        Err(failure) => return assert!(failure.to_string().contains("complex"), "{failure}"),
    };
    assert_eq!(tensors.len(), input.gradients().count());
    let measured = Clipper::cpu().measure(&measuring(Clip::norm(1.0)), &tensors).expect("it can be measured");
    assert_eq!(measured.elements, tensors.iter().map(|t| t.len() as u64).sum::<u64>());
    // A set can be its own parameters.
    assert_eq!(input.parameters(Some(&input)).expect("they fit").len(), tensors.len());
}

/// Arguments, one per line. Accepted arguments describe a valid clip; others are a usage error.
pub fn arguments(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let cli = match Cli::try_parse_from(std::iter::once("gradclip").chain(text.split('\n'))) {
        Ok(cli) => cli,
        Err(error) => {
            assert!(matches!(error.exit_code(), 0 | 2) && !error.render().to_string().is_empty());
            return;
        }
    };
    let clip = match &cli.command {
        Command::Norm(args) => args.measure.clip(Clip::norm(f64::INFINITY)).map(Some),
        Command::Clip(args) => args.clip().map(Some),
        Command::Verify(args) => args.options.clip(),
        _ => return,
    };
    if let (Command::Clip(args), Ok(Some(clip))) = (&cli.command, &clip) {
        args.options.groups(*clip).expect("they are checked with it").clips().for_each(|clip| check_clip(&clip));
    }
    match clip.and_then(|clip| clip.map_or(Ok(None), |clip| Ok(clip.check().map(|()| Some(clip))?))) {
        Ok(None) => {}
        Ok(Some(clip)) => check_clip(&clip),
        Err(failure) => assert!(matches!(failure, Failure::Usage(_)) && failure.exit_code() == 2, "{failure}"),
    }
}

/// Checks that an accepted clip has settings as documented, can be printed, and clips gradients.
fn check_clip(clip: &Clip) {
    match clip.mode {
        Mode::Agc(x) => assert!(x >= 0.0 && x.is_finite()),
        Mode::Value { min, max } => assert!(min <= max),
        Mode::Norm(x) | Mode::Rms(x) | Mode::AverageNorm(x) => assert!(x >= 0.0),
        _ => panic!("{clip:?}"),
    }
    assert!(clip.grad_scale > 0.0 && clip.grad_scale.is_finite() && clip.norm_type.power() > 0.0);
    assert!([clip.eps, clip.agc_eps].iter().flatten().all(|eps| *eps >= 0.0 && eps.is_finite()));
    assert!(!clip.to_string().is_empty() && !norm_name(clip).is_empty());
    measuring(*clip).check().expect("what can be clipped can be measured");

    let mut a = [3.0f32, -4.0, 0.0, 1e30, 1e-30, 2.0];
    let mut b = [1.0f64, -1.0];
    let (of_a, of_b) = (a, b);
    let parameters = [gradclip::Tensor::new(&of_a).shape(&[2, 3]).expect("fits"), gradclip::Tensor::new(&of_b)];
    let mut tensors = [
        TensorMut::new(&mut a).shape(&[2, 3]).expect("fits").parameter(&parameters[0]),
        TensorMut::new(&mut b).parameter(&parameters[1]),
    ];
    let report = match Clipper::cpu().apply(clip, &mut tensors) {
        Ok(report) => report,
        Err(Error::Tensor { .. }) if matches!(clip.unit_axis, Some(UnitAxis::Axes(_) | UnitAxis::Over(_))) => return,
        Err(error) => panic!("finite gradients can be clipped: {error}"),
    };
    assert!(report.elements == 8 && (0.0..=1.0).contains(&report.clip_coef));
    if !report.clipped && clip.grad_scale == 1.0 {
        assert!(a == of_a && b == of_b);
    }
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

    #[test]
    fn files_hold_on_their_corpus() {
        replay(ROOT, "file", super::file);
    }

    #[test]
    fn indexes_hold_on_their_corpus() {
        replay(ROOT, "index", super::index);
    }

    #[test]
    fn arguments_hold_on_their_corpus() {
        replay(ROOT, "arguments", super::arguments);
    }
}
