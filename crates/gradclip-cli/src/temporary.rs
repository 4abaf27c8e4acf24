//! Temporary files beside their targets: created, removed on an interrupt, and renamed to their targets.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use indicatif::ProgressBar;
use tempfile::{NamedTempFile, TempPath};

use crate::failure::Failure;
use crate::input::folder_of;

/// How much is copied between two steps of the progress bar.
const BLOCK: usize = 8 << 20;

/// The failure if a target exists and may not be replaced.
pub(crate) fn exists(target: &Path) -> Failure {
    Failure::file(target, "exists already: choose another OUT, or replace it with --force")
}

/// The temporary files and folders that an interrupt must remove. Locked during renames.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

pub(crate) fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a folder of temporary files, even while others write into it.
pub(crate) fn remove_folder(path: &Path) {
    // Once it has another name, nobody opens new files in it.
    let renamed = path.with_extension("gone.tmp");
    let path = fs::rename(path, &renamed).map_or(path, |()| &renamed);
    for _ in 0..100 {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {}
            _ => break,
        }
    }
}

/// From now on a file that may not become so long (`ulimit -f`) is an error of who writes it, and not a signal.
pub(crate) fn ignore_length_signal() {
    #[cfg(unix)]
    signals::ignore(&[libc::SIGXFSZ]);
}

/// From the first call on, an interrupt removes unfinished files.
pub(crate) fn watch_for_interrupts() -> Result<(), Failure> {
    static WATCHING: Mutex<bool> = Mutex::new(false);
    let mut watching = WATCHING.lock().unwrap_or_else(PoisonError::into_inner);
    if *watching {
        return Ok(());
    }
    #[cfg(unix)]
    let ignored = signals::ignored();
    ctrlc::set_handler(|| {
        // Held until the process ends: nothing can be created or renamed any more.
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

/// Makes temporary files and folders, with these permissions less the umask.
pub(crate) fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".gradclip-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// An empty file in the folder of the target, with the permissions of an ordinary new file.
pub(crate) fn empty(target: &Path) -> Result<NamedTempFile, Failure> {
    watch_for_interrupts()?;
    // One lock for both: an interrupt in between would miss the file.
    let mut unfinished = unfinished();
    let file = builder(0o666).tempfile_in(folder_of(target)).map_err(Failure::io(target, "write"))?;
    unfinished.push(file.path().to_owned());
    Ok(file)
}

/// A file with these contents.
pub(crate) fn copy<'a>(
    blocks: impl Iterator<Item = &'a [u8]>,
    target: &Path,
    progress: &ProgressBar,
) -> Result<NamedTempFile, Failure> {
    let mut copy = empty(target)?;
    for block in blocks.flat_map(|block| block.chunks(BLOCK)) {
        copy.write_all(block).map_err(Failure::io(target, "write"))?;
        progress.inc(block.len() as u64);
    }
    Ok(copy)
}

/// Renames the copies to their targets, in order: all or none. The index is the last. An index that will be replaced is
/// removed first, because it must not list old and new shards.
pub(crate) fn place(copies: Vec<(NamedTempFile, &PathBuf)>, index: Option<&Path>, force: bool) -> Result<(), Failure> {
    let mut unfinished = unfinished();
    if let Some(index) = index.filter(|_| force) {
        match fs::remove_file(index) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Failure::io(index, "replace")(error)),
            _ => {}
        }
    }
    // Closed first, because some systems cannot rename open files.
    let copies: Vec<_> = copies.into_iter().map(|(copy, target)| (copy.into_temp_path(), target)).collect();
    let paths: Vec<_> = copies.iter().map(|(copy, _)| copy.to_path_buf()).collect();
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
    unfinished.retain(|path| !paths.contains(path));
    if let Some(target) = placed.last() {
        sync_folder_of(target);
    }
    Ok(())
}

/// Syncs the folder of a target. The bytes are on disk already; if this fails, only the names may be lost.
pub(crate) fn sync_folder_of(target: &Path) {
    if cfg!(unix) {
        let _ = File::open(folder_of(target)).and_then(|folder| folder.sync_all());
    }
}

/// Signals that were ignored from the start stay ignored: under `nohup` the program outlives its terminal.
#[cfg(unix)]
mod signals {
    use std::mem::MaybeUninit;
    use std::ptr::{null, null_mut};

    /// The interrupts that are ignored now.
    pub(super) fn ignored() -> Vec<libc::c_int> {
        let ignored = |signal: &libc::c_int| {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed();
            // SAFETY: Nothing is set, and `action`, for which zeros are a valid value, has room for the answer.
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
    use std::iter::once;

    use super::*;

    fn copies(folder: &Path, targets: &[PathBuf]) -> Vec<NamedTempFile> {
        let make = |target: &PathBuf| copy(once(&b"new"[..]), target, &ProgressBar::hidden()).unwrap();
        let copies: Vec<_> = targets.iter().map(make).collect();
        assert_eq!(fs::read_dir(folder).unwrap().count(), targets.len() + 1);
        copies
    }

    /// A file that appears after the check, and a folder, which cannot be replaced even with `--force`.
    #[test]
    fn a_failing_rename_undoes_the_earlier_ones() {
        for force in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let targets = ["a", "b", "c"].map(|name| folder.path().join(name));
            if force {
                fs::create_dir(&targets[1]).unwrap();
            } else {
                fs::write(&targets[1], "old").unwrap();
            }
            let copies = copies(folder.path(), &targets);
            let failure = place(copies.into_iter().zip(&targets).collect(), None, force).unwrap_err();
            assert!(failure.to_string().starts_with(&targets[1].display().to_string()), "{failure}");
            let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(left, ["b"]);
        }
    }
}
