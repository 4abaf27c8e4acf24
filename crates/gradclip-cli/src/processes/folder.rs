//! The folder that turns into OUT when every rank has written its files into it.
//!
//! Rank 0 makes it beside OUT, under a name of its own, and renames it in the end; the others know it by its name. Who fails,
//! or is interrupted, removes it; but from when a rank says that its files are written, that is left to rank 0, because by
//! then it may be OUT.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::input::folder_of;
use crate::output::{exists, remove_folder, sync_folder_of, unfinished, watch_for_interrupts};

#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    out: PathBuf,
    force: bool,
    /// Whether this rank removes it.
    removes: bool,
}

impl Folder {
    /// Makes it, if OUT may be written.
    pub(super) fn make(out: &Path, files: &[PathBuf], force: bool) -> Result<Self, Failure> {
        check(out, files, force)?;
        watch_for_interrupts()?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".gradclip-").suffix(".tmp");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777)); // less the umask
        // One lock for both: an interrupt in between would miss the folder.
        let mut unfinished = unfinished();
        let path = builder.tempdir_in(folder_of(out)).map_err(Failure::io(out, "write"))?.keep();
        unfinished.push(path.clone());
        Ok(Self { path, out: out.to_owned(), force, removes: true })
    }

    /// The folder that rank 0 has made.
    pub(super) fn of_rank_0(out: &Path, name: &str) -> Result<Self, Failure> {
        watch_for_interrupts()?;
        let path = folder_of(out).join(name);
        if !path.is_dir() {
            let problem =
                "rank 0 has begun to write it where this rank does not see it: OUT must lie where all ranks do";
            return Err(Failure::file(out, problem));
        }
        unfinished().push(path.clone());
        Ok(Self { path, out: out.to_owned(), force: false, removes: true })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the other ranks know it by.
    pub(super) fn name(&self) -> Option<&str> {
        self.path.file_name().and_then(OsStr::to_str)
    }

    /// Leaves it to rank 0: for the others, before they say that their files are written.
    pub(super) fn hand_over(&mut self) {
        self.forget(&mut unfinished());
        self.removes = false;
    }

    /// An interrupt need not remove it for this rank any more; others may be threads of the same process.
    fn forget(&self, unfinished: &mut Vec<PathBuf>) {
        if let Some(own) = unfinished.iter().position(|path| *path == self.path) {
            unfinished.swap_remove(own);
        }
    }

    /// Turns it into OUT. What OUT was before, if that is to be replaced, is removed.
    pub(super) fn place(self) -> Result<(), Failure> {
        // An interrupt waits.
        let _unfinished = unfinished();
        let there = self.out.symlink_metadata().is_ok();
        if there && !self.force {
            return Err(exists(&self.out));
        }
        let placed = if there { replace(&self.path, &self.out) } else { fs::rename(&self.path, &self.out) };
        placed.map_err(Failure::io(&self.out, "write"))?;
        sync_folder_of(&self.out);
        Ok(())
    }

    /// A failure in this folder is one of OUT.
    pub(super) fn told(&self, failure: Failure) -> Failure {
        match failure {
            Failure::File { path, problem } => match path.strip_prefix(&self.path) {
                Ok(file) => Failure::File { path: self.out.join(file), problem },
                Err(_) => Failure::File { path, problem },
            },
            other => other,
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.removes {
            // An interrupt waits.
            let mut unfinished = unfinished();
            remove_folder(&self.path);
            self.forget(&mut unfinished);
        }
    }
}

/// Puts a folder in the place of another, which is removed.
fn replace(new: &Path, out: &Path) -> io::Result<()> {
    // At one stroke, where the system and the file system can.
    #[cfg(target_os = "linux")]
    if rustix::fs::renameat_with(rustix::fs::CWD, new, rustix::fs::CWD, out, rustix::fs::RenameFlags::EXCHANGE).is_ok()
    {
        let _ = fs::remove_dir_all(new);
        return Ok(());
    }
    replace_in_two(new, out)
}

/// The same where a kill in between leaves both folders and no OUT.
fn replace_in_two(new: &Path, out: &Path) -> io::Result<()> {
    let old = new.with_extension("old");
    fs::rename(out, &old)?;
    if let Err(error) = fs::rename(new, out) {
        let _ = fs::rename(&old, out);
        return Err(error);
    }
    let _ = fs::remove_dir_all(old);
    Ok(())
}

/// Checks that OUT can be written, and harms nothing but what it was before.
fn check(out: &Path, files: &[PathBuf], force: bool) -> Result<(), Failure> {
    if out.file_name().is_none() {
        return Err(Failure::Usage(format!("OUT must name a folder to be made, which {:?} does not", out.display())));
    }
    let folder = folder_of(out);
    if !folder.is_dir() {
        return Err(Failure::file(folder, "not a folder, so OUT cannot be written there: make it first"));
    }
    match out.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::io(out, "write")(error)),
        Ok(_) if !force => return Err(exists(out)),
        Ok(found) if !found.is_dir() => return Err(Failure::file(out, "not a folder: choose another OUT")),
        Ok(_) => {}
    }
    let real = out.canonicalize().map_err(Failure::io(out, "open"))?;
    for file in files {
        if file.canonicalize().map_err(Failure::io(file, "open"))?.starts_with(&real) {
            let message = format!("{}: OUT would replace its own input: choose another OUT", out.display());
            return Err(Failure::Usage(message));
        }
    }
    // An old set may have had other names, but OUT is not to be somebody's home.
    for entry in out.read_dir().map_err(Failure::io(out, "read"))? {
        let entry = entry.map_err(Failure::io(out, "read"))?;
        let name = entry.file_name();
        let is_ours = Path::new(&name).extension() == Some(OsStr::new("safetensors"))
            || files.iter().any(|file| file.file_name() == Some(&name));
        if !is_ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            let problem = format!("holds {name:?}, which is no safetensors file: remove it, or choose another OUT");
            return Err(Failure::file(out, problem));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &Path, file: &str) {
        fs::create_dir(path).unwrap();
        fs::write(path.join(file), "").unwrap();
    }

    fn names(path: &Path) -> Vec<String> {
        path.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Other ranks may still be writing into it, and nobody comes back for it.
    #[test]
    fn what_is_removed_stays_so() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("out.tmp");
        for _ in 0..100 {
            fs::create_dir(&path).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while tempfile::Builder::new().tempfile_in(&path).and_then(|file| Ok(file.keep()?)).is_ok() {}
                });
                while path.read_dir().unwrap().count() < 3 {}
                remove_folder(&path);
            });
            assert_eq!(names(parent.path()), [""; 0]);
        }
    }

    #[test]
    fn a_folder_takes_the_place_of_another() {
        for replace in [replace, replace_in_two] {
            let parent = tempfile::tempdir().unwrap();
            let (new, out) = (parent.path().join("new.tmp"), parent.path().join("out"));
            folder(&new, "new");
            folder(&out, "old");
            replace(&new, &out).unwrap();
            assert_eq!((names(parent.path()), names(&out)), (vec!["out".to_owned()], vec!["new".to_owned()]));
            // There is nothing to put in its place.
            assert_eq!(replace(&new, &out).unwrap_err().kind(), ErrorKind::NotFound);
            assert_eq!((names(parent.path()), names(&out)), (vec!["out".to_owned()], vec!["new".to_owned()]));
        }
    }
}
