//! The folder that is renamed to OUT when every rank has written its files into it.
//!
//! Rank 0 creates it beside OUT, under a unique name, and renames it in the end; the other ranks open it by its name. A rank that
//! fails or is interrupted removes it. Once a rank has reported that its files are written, only rank 0 may remove it,
//! because the folder may be OUT by then.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::input::folder_of;
use crate::temporary::{builder, exists, remove_folder, sync_folder_of, unfinished, watch_for_interrupts};

#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    out: PathBuf,
    force: bool,
    /// Whether this rank removes it.
    removes: bool,
}

impl Folder {
    /// Creates the folder, if OUT may be written.
    pub(super) fn create(out: &Path, files: &[PathBuf], force: bool) -> Result<Self, Failure> {
        check(out, files, force)?;
        watch_for_interrupts()?;
        // One lock for both: an interrupt in between would miss the folder.
        let mut unfinished = unfinished();
        let path = builder(0o777).tempdir_in(folder_of(out)).map_err(Failure::io(out, "write"))?.keep();
        unfinished.push(path.clone());
        Ok(Self { path, out: out.to_owned(), force, removes: true })
    }

    /// Opens the folder that rank 0 has created.
    pub(super) fn open(out: &Path, name: &str) -> Result<Self, Failure> {
        watch_for_interrupts()?;
        let path = folder_of(out).join(name);
        if !path.is_dir() {
            let problem =
                "this rank does not see the folder that rank 0 has created: all ranks must see the folder of OUT";
            return Err(Failure::file(out, problem));
        }
        unfinished().push(path.clone());
        Ok(Self { path, out: out.to_owned(), force: false, removes: true })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name by which the other ranks open it.
    pub(super) fn name(&self) -> Option<&str> {
        self.path.file_name().and_then(OsStr::to_str)
    }

    /// Leaves removal to rank 0. The other ranks call this before they report that their files are written.
    pub(super) fn leave_to_rank_0(&mut self) {
        self.forget(&mut unfinished());
        self.removes = false;
    }

    /// An interrupt need no longer remove it for this rank. Other ranks may be threads of the same process.
    fn forget(&self, unfinished: &mut Vec<PathBuf>) {
        if let Some(own) = unfinished.iter().position(|path| *path == self.path) {
            unfinished.swap_remove(own);
        }
    }

    /// Renames it to OUT. An old OUT is removed, if it may be replaced.
    pub(super) fn rename(self) -> Result<(), Failure> {
        // An interrupt waits.
        let _unfinished = unfinished();
        let exists_already = self.out.symlink_metadata().is_ok();
        if exists_already && !self.force {
            return Err(exists(&self.out));
        }
        let renamed = if exists_already { replace(&self.path, &self.out) } else { fs::rename(&self.path, &self.out) };
        renamed.map_err(Failure::io(&self.out, "write"))?;
        sync_folder_of(&self.out);
        Ok(())
    }

    /// Names OUT in a failure of a file in this folder.
    pub(super) fn with_final_path(&self, failure: Failure) -> Failure {
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

/// Replaces a folder by another, and removes the old one.
fn replace(new: &Path, out: &Path) -> io::Result<()> {
    // In one step, where the system and the file system can.
    #[cfg(target_os = "linux")]
    if rustix::fs::renameat_with(rustix::fs::CWD, new, rustix::fs::CWD, out, rustix::fs::RenameFlags::EXCHANGE).is_ok()
    {
        let _ = fs::remove_dir_all(new);
        return Ok(());
    }
    replace_in_two_steps(new, out)
}

/// The same in two renames. A kill in between leaves both folders and no OUT.
fn replace_in_two_steps(new: &Path, out: &Path) -> io::Result<()> {
    let old = new.with_extension("old");
    fs::rename(out, &old)?;
    if let Err(error) = fs::rename(new, out) {
        let _ = fs::rename(&old, out);
        return Err(error);
    }
    let _ = fs::remove_dir_all(old);
    Ok(())
}

/// Checks that OUT can be written, and that nothing but an old OUT is replaced.
fn check(out: &Path, files: &[PathBuf], force: bool) -> Result<(), Failure> {
    if out.file_name().is_none() {
        return Err(Failure::Usage(format!("OUT must name a new folder, which {:?} does not", out.display())));
    }
    let folder = folder_of(out);
    if !folder.is_dir() {
        return Err(Failure::file(folder, "not a folder, so OUT cannot be written there: create it first"));
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
    // An old set may have other names, but a folder with anything else is not replaced.
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

    /// Other ranks may still be writing into it, and nobody removes it later.
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
    fn a_folder_replaces_another() {
        for replace in [replace, replace_in_two_steps] {
            let parent = tempfile::tempdir().unwrap();
            let (new, out) = (parent.path().join("new.tmp"), parent.path().join("out"));
            folder(&new, "new");
            folder(&out, "old");
            replace(&new, &out).unwrap();
            assert_eq!((names(parent.path()), names(&out)), (vec!["out".to_owned()], vec!["new".to_owned()]));
            // There is no new folder any more.
            assert_eq!(replace(&new, &out).unwrap_err().kind(), ErrorKind::NotFound);
            assert_eq!((names(parent.path()), names(&out)), (vec!["out".to_owned()], vec!["new".to_owned()]));
        }
    }
}
