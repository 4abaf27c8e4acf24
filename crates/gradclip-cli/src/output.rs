//! Writing gradients: whole or not at all.
//!
//! ```text
//! check      no target may be an input, or exist (unless forced)
//! fill       a temporary file in the folder of each target, in one of two ways:
//!              stream: clip piece by piece, as was decided before (stream.rs)
//!              mapped: copy each input, or write zeros in place of its sums; then clip into the mapped copies
//! check      no input may have changed meanwhile
//! sync       every temporary file
//! rename     each file to its target, the index last; an index that is replaced is removed first
//! ```
//!
//! The CPU streams. A GPU clips whole tensors, and sums of examples are written whole.
//!
//! A failure before the first rename leaves nothing behind, because temporary files are removed when dropped. If a rename
//! fails, the earlier ones are undone. An interrupt (Ctrl-C) waits for the renames, and otherwise removes the temporary files.
//! A killed process leaves temporary files behind, but no OUT: without its index a set is none, so no index ever lists shards
//! of two sets.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::iter::once;
use std::path::{Path, PathBuf};

use gradclip::{Tensor, TensorMut};
use indicatif::ProgressBar;
use same_file::Handle;
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::failure::Failure;
use crate::groups::Decided;
use crate::input::{INDEX_SUFFIX, Input, InputFile, folder_of, is_index, unchanged};
use crate::layout::{Content, FileLayout};
use crate::mapped::MappedMut;
use crate::stream;
use crate::temporary::{self, exists};

/// What will be written, and where.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    /// Each file with its target.
    files: Vec<(FileLayout<'a>, PathBuf)>,
    /// The text of the index of a sharded set, with its target.
    index: Option<(Vec<u8>, PathBuf)>,
    /// What is read meanwhile.
    inputs: Vec<&'a Input>,
    force: bool,
}

/// Copies of the input files in temporary files, not clipped yet.
pub(crate) struct Copies<'o, 'a> {
    output: &'o Output<'a>,
    files: Vec<NamedTempFile>,
    maps: Vec<MappedMut>,
}

impl<'a> Output<'a> {
    /// Chooses the targets and checks them before any work begins.
    pub(crate) fn new(
        input: &'a Input,
        parameters: Option<&'a Input>,
        out: &Path,
        content: Content,
        force: bool,
    ) -> Result<Self, Failure> {
        match (&input.index, is_index(out)) {
            (Some(_), false) => {
                let message = format!("the input is a sharded set, so OUT must end in {INDEX_SUFFIX}");
                return Err(Failure::Usage(message));
            }
            (None, true) => {
                let message = format!("the input is a single file, so OUT must not end in {INDEX_SUFFIX}");
                return Err(Failure::Usage(message));
            }
            _ => {}
        }
        let beside = |file: &InputFile| out.with_file_name(file.path.file_name().unwrap_or_default());
        let target = |file| if input.index.is_some() { beside(file) } else { out.to_owned() };
        let mut targets: Vec<_> = input.files.iter().map(target).collect();
        targets.extend(input.index.iter().map(|_| out.to_owned()));
        let inputs: Vec<_> = once(input).chain(parameters).collect();
        check(&targets, inputs.iter().copied(), force)?;
        let files = input.files.iter().zip(targets);
        let files = files.map(|(file, target)| Ok((FileLayout::new(file, content)?, target)));
        let files = files.collect::<Result<Vec<_>, Failure>>()?;
        let size = files.iter().map(|(layout, _)| layout.data_len()).sum();
        let resized = content != Content::Same;
        let text = |text: Vec<u8>| if resized { with_total_size(text, size) } else { text };
        let index = input.index.clone().map(|index| (text(index), out.to_owned()));
        Ok(Self { files, index, inputs, force })
    }

    /// Several files, under their names, in a folder that nobody else writes to.
    pub(crate) fn into_folder(inputs: &'a [Input], folder: &Path, content: Content) -> Result<Self, Failure> {
        let target = |file: &InputFile| folder.join(file.path.file_name().unwrap_or_default());
        let files = inputs.iter().flat_map(|input| &input.files);
        let files = files.map(|file| Ok((FileLayout::new(file, content)?, target(file))));
        let files = files.collect::<Result<_, Failure>>()?;
        Ok(Self { files, index: None, inputs: inputs.iter().collect(), force: false })
    }

    /// How many bytes will be written.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|(layout, _)| layout.len()).sum()
    }

    /// The input, and the parameters if there are any.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &'a Input> {
        self.inputs.iter().copied()
    }

    /// Writes the files piece by piece, clipped as decided, on the threads of the current pool.
    pub(crate) fn stream(&self, decided: &Decided, progress: &ProgressBar) -> Result<(), Failure> {
        let empty = |(_, target): &(FileLayout<'_>, PathBuf)| temporary::empty(target);
        let temporary_files = self.files.iter().map(empty).collect::<Result<Vec<_>, _>>()?;
        let outputs = self.files.iter().zip(&temporary_files);
        let outputs = outputs.map(|((layout, target), file)| (layout, file.as_file(), target.as_path()));
        stream::write(outputs, decided, progress)?;
        self.finish(temporary_files)
    }

    /// Writes copies for [`Copies::clip`]. In place of each sum are zeros.
    pub(crate) fn copy(&self, progress: &ProgressBar) -> Result<Copies<'_, 'a>, Failure> {
        let (mut files, mut maps) = (Vec::new(), Vec::new());
        for (layout, target) in &self.files {
            // Written before it is mapped: a full disk is then an error, not a signal.
            let file = temporary::copy(layout.blocks(), target, progress)?;
            maps.push(MappedMut::open(file.as_file(), target)?);
            files.push(file);
        }
        Ok(Copies { output: self, files, maps })
    }

    /// Renames the files to their targets, and the index last, if there is one.
    fn finish(&self, files: Vec<NamedTempFile>) -> Result<(), Failure> {
        unchanged(self.inputs())?;
        let mut files: Vec<_> = files.into_iter().zip(self.files.iter().map(|(_, target)| target)).collect();
        if let Some((text, target)) = &self.index {
            files.push((temporary::copy(once(&text[..]), target, &ProgressBar::hidden())?, target));
        }
        for (file, target) in &files {
            file.as_file().sync_all().map_err(Failure::io(target, "write"))?;
        }
        temporary::place(files, self.index.as_ref().map(|(_, target)| target.as_path()), self.force)
    }
}

impl Copies<'_, '_> {
    /// Calls `clip` with the copies of the gradients, or with the zeros in place of their sums, and renames the files to their
    /// targets. `parameters` are those of the gradients, or none; `counted` says which gradients norms count.
    pub(crate) fn clip<T>(
        mut self,
        parameters: &[Tensor<'_>],
        counted: impl Fn(usize) -> bool,
        clip: impl FnOnce(Vec<TensorMut<'_>>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut tensors = Vec::new();
        for ((layout, _), map) in self.output.files.iter().zip(&mut self.maps) {
            tensors.append(&mut layout.tensors_in(&mut map.map)?);
        }
        let mut parameters = parameters.iter();
        let mut described = Vec::new();
        for (i, tensor) in tensors.into_iter().enumerate() {
            let tensor = tensor.replica(!counted(i));
            described.push(match parameters.next() {
                Some(parameter) => tensor.parameter(parameter),
                None => tensor,
            });
        }
        let result = clip(described)?;

        for (map, (_, target)) in self.maps.into_iter().zip(&self.output.files) {
            map.finish(target)?;
        }
        self.output.finish(self.files)?;
        Ok(result)
    }
}

/// Writes bytes to a file: whole or not at all.
pub(crate) fn write_file(bytes: &[u8], target: &Path, force: bool) -> Result<(), Failure> {
    let copy = temporary::copy(once(bytes), target, &ProgressBar::hidden())?;
    copy.as_file().sync_all().map_err(Failure::io(target, "write"))?;
    temporary::place(vec![(copy, &target.to_owned())], None, force)
}

/// Checks that targets can be written: none may be an input, or exist unless forced.
pub(crate) fn check<'a>(
    targets: &[PathBuf],
    inputs: impl Iterator<Item = &'a Input>,
    force: bool,
) -> Result<(), Failure> {
    let paths = inputs.flat_map(|input| input.files.iter().map(|file| &*file.path).chain([&*input.path]));
    check_paths(targets, paths, force)
}

/// The same for inputs that are not open.
pub(crate) fn check_paths<'a>(
    targets: &[PathBuf],
    inputs: impl Iterator<Item = &'a Path>,
    force: bool,
) -> Result<(), Failure> {
    let sources =
        inputs.map(|path| Handle::from_path(path).map_err(Failure::io(path, "open"))).collect::<Result<Vec<_>, _>>()?;
    let mut distinct = HashSet::new();
    for target in targets {
        if target.file_name().is_none() {
            return Err(Failure::Usage(format!("OUT must name a file, which {:?} does not", target.display())));
        }
        let folder = folder_of(target);
        if !folder.is_dir() {
            return Err(Failure::file(folder, "not a folder, so OUT cannot be written there: create it first"));
        }
        if !distinct.insert(target) {
            return Err(Failure::file(target, "OUT has the name of one of the shards: choose another"));
        }
        match target.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::io(target, "write")(error)),
            Ok(_) => {}
        }
        // Links are followed: OUT may be a link to an input, to a device, or to nothing.
        match target.metadata() {
            Ok(found) if found.is_dir() => return Err(Failure::file(target, "a folder: OUT must name a file")),
            Ok(found) if !found.is_file() => {
                return Err(Failure::file(target, "not a regular file: choose another OUT"));
            }
            Ok(_) if Handle::from_path(target).is_ok_and(|target| sources.contains(&target)) => {
                let message = format!("{}: OUT would replace its own input: choose another OUT", target.display());
                return Err(Failure::Usage(message));
            }
            _ if force => {}
            _ => return Err(exists(target)),
        }
    }
    Ok(())
}

/// The text of an index, with this total size of its tensors if it states one.
fn with_total_size(text: Vec<u8>, size: u64) -> Vec<u8> {
    let mut index: Value = serde_json::from_slice(&text).unwrap_or_default();
    match index.pointer_mut("/metadata/total_size") {
        Some(stated) => *stated = size.into(),
        None => return text,
    }
    index.to_string().into_bytes()
}
