//! Writing gradients: whole or not at all.
//!
//! ```text
//! check      no target may be an input, or exist (unless forced)
//! fill       a temporary file in each target's folder, in one of two ways:
//!              stream: clipped piece by piece, as was decided before (stream.rs)
//!              mapped: each input copied, byte for byte, or room for its sums; then clipped in the copies, mapped
//! check      no input may have changed meanwhile
//! sync       every temporary file
//! rename     each to its target, an index last; one that is replaced goes first
//! ```
//!
//! The CPU streams. A GPU clips tensors whole, and sums of examples are written whole.
//!
//! Whatever fails before the first rename leaves nothing behind, because temporary files vanish when dropped. A rename
//! that fails takes the earlier ones back. An interrupt (Ctrl-C) is held off during the renames and otherwise removes
//! the temporary files. A process that is killed leaves these behind, but no OUT; a set without its index is none, and so
//! shards of two sets never stand under one index.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::iter::once;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use gradclip::{DecidedClip, Tensor, TensorMut};
use indicatif::ProgressBar;
use same_file::Handle;
use serde_json::Value;
use tempfile::{NamedTempFile, TempPath};

use crate::failure::Failure;
use crate::input::{INDEX_SUFFIX, Input, Part, folder_of, is_index, unchanged};
use crate::layout::Layout;
use crate::mapped::MappedMut;
use crate::stream;

/// How much is copied between two steps of the progress bar.
const BLOCK: usize = 8 << 20;

/// Where an input's parts, and its index if it has one, will be written.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    layouts: Vec<Layout<'a>>,
    /// The text of the index of a sharded set.
    index: Option<Vec<u8>>,
    /// One for each layout; then the index.
    targets: Vec<PathBuf>,
    /// What is read meanwhile.
    inputs: Vec<&'a Input>,
    force: bool,
}

/// Copies of an input's parts in temporary files, not clipped yet.
pub(crate) struct Copies<'o, 'a> {
    output: &'o Output<'a>,
    temporaries: Temporaries,
    files: Vec<NamedTempFile>,
    maps: Vec<MappedMut>,
}

impl<'a> Output<'a> {
    /// Decides the targets and checks them, so that hopeless work is not begun. With `sum`, sums of examples will be
    /// written.
    pub(crate) fn new(
        input: &'a Input,
        parameters: Option<&'a Input>,
        out: &Path,
        sum: bool,
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
        let beside = |part: &Path| out.with_file_name(part.file_name().unwrap_or_default());
        let mut targets = Vec::new();
        if input.index.is_some() {
            targets.extend(input.parts.iter().map(|part| beside(&part.path)));
        }
        targets.push(out.to_owned());
        let inputs: Vec<_> = once(input).chain(parameters).collect();
        check(&targets, inputs.iter().copied(), force)?;
        let layout = |part| if sum { Layout::sums(part) } else { Ok(Layout::copy(part)) };
        let layouts = input.parts.iter().map(layout).collect::<Result<Vec<_>, _>>()?;
        let mut index = input.index.clone();
        if sum {
            let size = layouts.iter().map(Layout::data_len).sum();
            index = index.map(|text| with_total_size(text, size));
        }
        Ok(Self { layouts, index, targets, inputs, force })
    }

    /// Copies of several files, under their names, in a folder that nobody else writes to.
    pub(crate) fn into_folder(inputs: &'a [Input], folder: &Path) -> Self {
        let parts = || inputs.iter().flat_map(|input| &input.parts);
        let target = |part: &Part| folder.join(part.path.file_name().unwrap_or_default());
        Self {
            layouts: parts().map(Layout::copy).collect(),
            index: None,
            targets: parts().map(target).collect(),
            inputs: inputs.iter().collect(),
            force: false,
        }
    }

    /// How many bytes will be written.
    pub(crate) fn bytes(&self) -> u64 {
        self.layouts.iter().map(Layout::len).sum()
    }

    /// The input, and the parameters if there are any.
    pub(crate) fn inputs(&self) -> impl Iterator<Item = &'a Input> {
        self.inputs.iter().copied()
    }

    /// Writes the parts piece by piece, clipped as was decided, on the threads of the current pool.
    pub(crate) fn stream(&self, decided: &DecidedClip, progress: &ProgressBar) -> Result<(), Failure> {
        let temporaries = Temporaries::new()?;
        let parts = self.layouts.iter().zip(&self.targets);
        let files = parts.map(|(_, target)| temporaries.empty(target)).collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<_> = self.layouts.iter().zip(&files).zip(&self.targets).collect();
        let parts = parts.iter().map(|((layout, file), target)| (*layout, file.as_file(), target.as_path()));
        stream::write(parts, decided, progress)?;
        self.finish(&temporaries, files)
    }

    /// Copies the parts, each gradient as it is or as zeros that are to be its sum, for [`Copies::clip`].
    pub(crate) fn copy(&self, progress: &ProgressBar) -> Result<Copies<'_, 'a>, Failure> {
        let temporaries = Temporaries::new()?;
        let copies = self.layouts.iter().zip(&self.targets);
        // Written before they are mapped: a full disk is then an error, not a signal.
        let files = copies
            .map(|(layout, target)| temporaries.copy(layout.blocks(), target, progress))
            .collect::<Result<Vec<_>, _>>()?;
        let maps = files.iter().zip(&self.targets);
        let maps = maps.map(|(file, target)| MappedMut::open(file.as_file(), target)).collect::<Result<_, _>>()?;
        Ok(Copies { output: self, temporaries, files, maps })
    }

    /// Puts the parts in place, and behind them the index, if there is one.
    fn finish(&self, temporaries: &Temporaries, mut files: Vec<NamedTempFile>) -> Result<(), Failure> {
        unchanged(self.inputs())?;
        let index = self.index.as_deref().zip(self.targets.last());
        if let Some((text, target)) = index {
            files.push(temporaries.copy(once(text), target, &ProgressBar::hidden())?);
        }
        for (file, target) in files.iter().zip(&self.targets) {
            file.as_file().sync_all().map_err(Failure::io(target, "write"))?;
        }
        let files = files.into_iter().zip(&self.targets);
        temporaries.place(files, index.map(|(_, target)| target.as_path()), self.force)
    }
}

impl Copies<'_, '_> {
    /// Lets `clip` work on the copies of the gradients, or on the zeros that are to be their sums, and puts them in place.
    /// `parameters` are those of the gradients, or none; `counted` tells which gradients norms count.
    pub(crate) fn clip<T>(
        mut self,
        parameters: &[Tensor<'_>],
        counted: impl Fn(usize) -> bool,
        clip: impl FnOnce(&mut [TensorMut<'_>]) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Output { layouts, targets, .. } = self.output;
        let mut tensors = Vec::new();
        for (layout, map) in layouts.iter().zip(&mut self.maps) {
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
        let result = clip(&mut described)?;
        drop(described);

        for (map, target) in self.maps.into_iter().zip(targets) {
            map.finish(target)?;
        }
        self.output.finish(&self.temporaries, self.files)?;
        Ok(result)
    }
}

/// Writes a file that is no input: whole or not at all.
pub(crate) fn write_file(bytes: &[u8], target: &Path, force: bool) -> Result<(), Failure> {
    let temporaries = Temporaries::new()?;
    let copy = temporaries.copy(once(bytes), target, &ProgressBar::hidden())?;
    copy.as_file().sync_all().map_err(Failure::io(target, "write"))?;
    temporaries.place(once((copy, &target.to_owned())), None, force)
}

/// Checks that targets can be written: none may be an input, or exist unless forced.
pub(crate) fn check<'a>(
    targets: &[PathBuf],
    inputs: impl Iterator<Item = &'a Input>,
    force: bool,
) -> Result<(), Failure> {
    let sources = inputs.flat_map(|input| input.parts.iter().map(|part| &part.path).chain([&input.path]));
    let sources = sources
        .map(|path| Handle::from_path(path).map_err(Failure::io(path, "open")))
        .collect::<Result<Vec<_>, _>>()?;
    let mut distinct = HashSet::new();
    for target in targets {
        if target.file_name().is_none() {
            return Err(Failure::Usage(format!("OUT must name a file, which {:?} does not", target.display())));
        }
        let folder = folder_of(target);
        if !folder.is_dir() {
            return Err(Failure::file(folder, "not a folder, so OUT cannot be written there: make it first"));
        }
        if !distinct.insert(target) {
            return Err(Failure::file(target, "OUT has the name of one of the shards: choose another"));
        }
        match target.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::io(target, "write")(error)),
            Ok(_) => {}
        }
        // Looking through links: OUT may be one that leads to an input, to a device, or nowhere.
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

/// The text of an index, if it states how large its tensors are, with what they have become.
fn with_total_size(text: Vec<u8>, size: u64) -> Vec<u8> {
    let mut index: Value = serde_json::from_slice(&text).unwrap_or_default();
    match index.pointer_mut("/metadata/total_size") {
        Some(stated) => *stated = size.into(),
        None => return text,
    }
    index.to_string().into_bytes()
}

pub(crate) fn exists(target: &Path) -> Failure {
    Failure::file(target, "exists already: choose another OUT, or replace it with --force")
}

/// The temporary files, and folders of them, that an interrupt must remove; locked while they turn into OUT.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

pub(crate) fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a folder of temporary files, into which others may be writing.
pub(crate) fn remove_folder(path: &Path) {
    // Under another name nothing is put into it but what was on its way.
    let aside = path.with_extension("gone.tmp");
    let path = fs::rename(path, &aside).map_or(path, |()| &aside);
    for _ in 0..100 {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
            _ => break,
        }
    }
}

/// Lets an interrupt remove what is unfinished, from the first call on.
pub(crate) fn watch_for_interrupts() -> Result<(), Failure> {
    static WATCHING: Mutex<bool> = Mutex::new(false);
    let mut watching = WATCHING.lock().unwrap_or_else(PoisonError::into_inner);
    if *watching {
        return Ok(());
    }
    #[cfg(unix)]
    let ignored = signals::ignored();
    ctrlc::set_handler(|| {
        // Held until the end of the process: nothing can be begun or put in place any more.
        let unfinished = unfinished();
        for path in unfinished.iter() {
            if fs::remove_file(path).is_err() {
                remove_folder(path);
            }
        }
        std::process::exit(130);
    })
    .map_err(|error| Failure::Setup(format!("cannot watch for interrupts: {error}")))?;
    #[cfg(unix)]
    signals::ignore(&ignored);
    *watching = true;
    Ok(())
}

/// Makes temporary files that do not outlive an interrupt.
struct Temporaries(());

impl Temporaries {
    fn new() -> Result<Self, Failure> {
        watch_for_interrupts()?;
        Ok(Self(()))
    }

    /// An empty file in the target's folder, with the permissions of an ordinary new file.
    fn empty(&self, target: &Path) -> Result<NamedTempFile, Failure> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".gradclip-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // less the umask
        // One lock for both: an interrupt in between would miss the file.
        let mut unfinished = unfinished();
        let file = builder.tempfile_in(folder_of(target)).map_err(Failure::io(target, "write"))?;
        unfinished.push(file.path().to_owned());
        Ok(file)
    }

    /// The same, filled.
    fn copy<'a>(
        &self,
        blocks: impl Iterator<Item = &'a [u8]>,
        target: &Path,
        progress: &ProgressBar,
    ) -> Result<NamedTempFile, Failure> {
        let mut copy = self.empty(target)?;
        for block in blocks.flat_map(|block| block.chunks(BLOCK)) {
            copy.write_all(block).map_err(Failure::io(target, "write"))?;
            progress.inc(block.len() as u64);
        }
        Ok(copy)
    }

    /// Renames the copies to their targets, in order; all of them, or none. The index, which is the last, makes a set of
    /// them: one that will be replaced must not hold together old shards and new.
    fn place<'a>(
        &self,
        copies: impl Iterator<Item = (NamedTempFile, &'a PathBuf)>,
        index: Option<&Path>,
        force: bool,
    ) -> Result<(), Failure> {
        let mut unfinished = unfinished();
        if let Some(index) = index.filter(|_| force) {
            match fs::remove_file(index) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(Failure::io(index, "replace")(error)),
                _ => {}
            }
        }
        // Closed first, because some systems rename no open file.
        let copies: Vec<_> = copies.map(|(copy, target)| (copy.into_temp_path(), target)).collect();
        let made: Vec<_> = copies.iter().map(|(copy, _)| copy.to_path_buf()).collect();
        let mut placed = Vec::<&Path>::new();
        for (copy, target) in copies {
            if let Err(failure) = rename(copy, target, force) {
                for target in placed {
                    let _ = fs::remove_file(target);
                }
                return Err(failure);
            }
            placed.push(target);
        }
        unfinished.retain(|path| !made.contains(path));
        if let Some(target) = placed.last() {
            sync_folder_of(target);
        }
        Ok(())
    }
}

/// The bytes are safe already. If a system cannot sync a folder, only the names depend on its next write-back.
pub(crate) fn sync_folder_of(target: &Path) {
    if cfg!(unix) {
        let _ = File::open(folder_of(target)).and_then(|folder| folder.sync_all());
    }
}

/// What a program is started to ignore it goes on ignoring: under `nohup`, its terminal goes and it stays.
#[cfg(unix)]
mod signals {
    use std::mem::MaybeUninit;
    use std::ptr::{null, null_mut};

    /// The interrupts that are ignored now.
    pub(super) fn ignored() -> Vec<libc::c_int> {
        let ignored = |signal: &libc::c_int| {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: Nothing is set, and `action`, for which zeros are a valid value, has room for what is told.
            let action = unsafe {
                libc::sigaction(*signal, null(), action.as_mut_ptr());
                action.assume_init()
            };
            action.sa_sigaction == libc::SIG_IGN
        };
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].into_iter().filter(ignored).collect()
    }

    pub(super) fn ignore(signals: &[libc::c_int]) {
        for &signal in signals {
            // SAFETY: Zeros are a valid action, and ignoring runs no code.
            unsafe {
                let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
                action.sa_sigaction = libc::SIG_IGN;
                libc::sigaction(signal, &raw const action, null_mut());
            }
        }
    }
}

fn rename(copy: TempPath, target: &Path, force: bool) -> Result<(), Failure> {
    let result = if force { copy.persist(target) } else { copy.persist_noclobber(target) };
    result.map_err(|failed| match failed.error.kind() {
        ErrorKind::AlreadyExists => exists(target),
        _ => Failure::io(target, "write")(failed.error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copies(folder: &Path, targets: &[PathBuf]) -> Vec<NamedTempFile> {
        let make = |target: &PathBuf| Temporaries(()).copy(once(&b"new"[..]), target, &ProgressBar::hidden()).unwrap();
        let copies: Vec<_> = targets.iter().map(make).collect();
        assert_eq!(fs::read_dir(folder).unwrap().count(), targets.len() + 1);
        copies
    }

    /// A file that appears after the check, and something that cannot be replaced even by force.
    #[test]
    fn a_failing_rename_takes_the_earlier_ones_back() {
        for force in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let targets = ["a", "b", "c"].map(|name| folder.path().join(name));
            if force {
                fs::create_dir(&targets[1]).unwrap();
            } else {
                fs::write(&targets[1], "old").unwrap();
            }
            let copies = copies(folder.path(), &targets);
            let failure = Temporaries(()).place(copies.into_iter().zip(&targets), None, force).unwrap_err();
            assert!(failure.to_string().starts_with(&targets[1].display().to_string()), "{failure}");
            let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left, ["b"]);
        }
    }
}
