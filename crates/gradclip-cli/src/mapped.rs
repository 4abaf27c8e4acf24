//! Mapped files. Other processes may change or truncate them meanwhile.
//!
//! If a mapped file was truncated, or the disk fails, access to the missing bytes raises SIGBUS. By default that ends the
//! process without a message, and leaves its temporary files behind. So a handler maps zeros there and sets a flag. The work
//! goes on with wrong numbers up to the check that comes before anything is reported or renamed, and fails there. (Windows does
//! not let a mapped file be truncated.)

use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::{Mmap, MmapMut};

use crate::failure::Failure;
use watch::Watch;

/// A file mapped for reading.
#[derive(Debug)]
pub(crate) struct Mapped {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    // Dropped in this order: unmapped memory must not be watched.
    watch: Watch,
    map: Mmap,
}

/// What shows that a file has changed, as precisely as its file system keeps it.
#[derive(Debug, PartialEq)]
struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
}

impl Mapped {
    pub(crate) fn open(path: &Path, file: File) -> Result<Self, Failure> {
        let stamp = Stamp::of(&file, path)?;
        // SAFETY: Nothing else in this process writes to the file: `Output` refuses targets that are inputs. Another
        // process could. If it changes bytes, the norm may be wrong, but nothing worse: every bit pattern is a valid byte,
        // and the header is read once. If it truncates the file, the bytes beyond its end become zeros (`watch`).
        // `unchanged` finds either.
        let map = unsafe { Mmap::map(&file) }.map_err(Failure::io(path, "map the file into memory"))?;
        Ok(Self { path: path.to_owned(), file, stamp, watch: Watch::new(&map), map })
    }

    /// Fails if the file has changed since it was opened: what was read is then invalid.
    pub(crate) fn unchanged(&self) -> Result<(), Failure> {
        if Stamp::of(&self.file, &self.path)? != self.stamp {
            return Err(Failure::file(
                &self.path,
                "changed while it was read: run it again while nothing writes to it",
            ));
        }
        if self.watch.lost() {
            return Err(Failure::file(&self.path, "cannot be read to its end: is the disk failing?"));
        }
        Ok(())
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Stamp {
    fn of(file: &File, path: &Path) -> Result<Self, Failure> {
        let found = file.metadata().map_err(Failure::io(path, "read"))?;
        Ok(Self { length: found.len(), modified: found.modified().ok() })
    }
}

/// A temporary file mapped for writing.
#[derive(Debug)]
pub(crate) struct MappedMut {
    watch: Watch,
    pub(crate) map: MmapMut,
}

impl MappedMut {
    /// `file` must be known to this process alone. Errors name `target`.
    pub(crate) fn open(file: &File, target: &Path) -> Result<Self, Failure> {
        // SAFETY: This process created the file under a random name that no other process knows, and maps it once. A
        // process that finds and changes it nevertheless spoils the result; one that truncates it makes zeros of what it
        // cut off, which `finish` finds. Every bit pattern is a valid byte.
        let map = unsafe { MmapMut::map_mut(file) }.map_err(Failure::io(target, "map the copy into memory"))?;
        Ok(Self { watch: Watch::new(&map), map })
    }

    /// Writes everything to the file, or fails.
    pub(crate) fn finish(self, target: &Path) -> Result<(), Failure> {
        self.map.flush().map_err(Failure::io(target, "write"))?;
        if self.watch.lost() {
            return Err(Failure::file(target, "cannot write all of it: is the disk full?"));
        }
        Ok(())
    }
}

#[cfg(unix)]
mod watch {
    use std::ffi::{c_int, c_void};
    use std::mem::MaybeUninit;
    use std::ptr::{null, null_mut};
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
    use std::sync::{Mutex, OnceLock, PoisonError};

    /// Watches a range of mapped memory until it is dropped.
    #[derive(Debug)]
    pub(crate) struct Watch(&'static Watched);

    /// Never freed, because the handler may be reading it: a few dozen bytes per mapped file.
    #[derive(Debug)]
    struct Watched {
        start: usize,
        /// Equal to `start` once it is no longer watched.
        end: AtomicUsize,
        page: usize,
        lost: AtomicBool,
        next: Option<&'static Self>,
    }

    /// The last of the list; each links to the one before.
    static LAST: AtomicPtr<Watched> = AtomicPtr::new(null_mut());
    /// Held while the list grows.
    static GROWING: Mutex<()> = Mutex::new(());
    /// The action of SIGBUS before.
    static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

    impl Watch {
        /// `memory` must begin at a page boundary, as a map does.
        pub(crate) fn new(memory: &[u8]) -> Self {
            let _growing = GROWING.lock().unwrap_or_else(PoisonError::into_inner);
            BEFORE.get_or_init(install);
            let start = memory.as_ptr().addr();
            // SAFETY: sysconf has no obligations.
            let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.try_into().unwrap_or(4096);
            let watched = Box::leak(Box::new(Watched {
                start,
                end: AtomicUsize::new(start + memory.len()),
                page,
                lost: AtomicBool::new(false),
                next: last(),
            }));
            LAST.store(watched, Ordering::Release);
            Self(watched)
        }

        /// Whether any of it was replaced by zeros.
        pub(crate) fn lost(&self) -> bool {
            self.0.lost.load(Ordering::Acquire)
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            self.0.end.store(self.0.start, Ordering::Release);
        }
    }

    fn last() -> Option<&'static Watched> {
        // SAFETY: It is null or comes from `Box::leak`, and is shared only.
        unsafe { LAST.load(Ordering::Acquire).as_ref() }
    }

    fn install() -> libc::sigaction {
        let mut before = MaybeUninit::zeroed();
        // SAFETY: For both, all zeros are a valid value, of which `sa_flags` and the handler are set here and `sa_mask` is
        // an empty set on every Unix. The handler is of the kind that SA_SIGINFO calls, and does only what a handler may.
        unsafe {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            action.sa_sigaction = on_bus_error as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, before.as_mut_ptr());
            before.assume_init()
        }
    }

    /// Uses only atomics and two system calls: a handler may do no more.
    extern "C" fn on_bus_error(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: The system hands over a valid `siginfo_t`, which for SIGBUS has an address.
        let address = unsafe { (*info).si_addr() }.addr();
        let mut each = last();
        while let Some(watched) = each {
            if watched.replace(address) {
                return;
            }
            each = watched.next;
        }
        // Not ours: restore the action of before, which runs when the same access fails again.
        let before = BEFORE.get().map_or(null(), |before| &raw const *before);
        // SAFETY: The action is one that the system itself handed over. Were there none yet, nothing would be set, and the
        // handler be called until there is.
        unsafe { libc::sigaction(libc::SIGBUS, before, null_mut()) };
    }

    impl Watched {
        /// Maps zeros from the page of this address on, if it is watched.
        fn replace(&self, address: usize) -> bool {
            let end = self.end.load(Ordering::Acquire);
            if !(self.start..end).contains(&address) {
                return false;
            }
            let from = address - address % self.page;
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
            let kind = kind | libc::MAP_FIXED | libc::MAP_NORESERVE;
            // SAFETY: `mmap` is a bare call of the system. The range lies within one map of this process, which begins with
            // a page and ends with the page of `end`: a `Watch` is dropped before its map. Of what is lost here nobody has
            // read anything else, and whoever reads it finds bytes, as before.
            let mapped = unsafe { libc::mmap(from as *mut c_void, end - from, access, kind, -1, 0) };
            if mapped == libc::MAP_FAILED {
                return false;
            }
            self.lost.store(true, Ordering::Release);
            true
        }
    }
}

#[cfg(not(unix))]
mod watch {
    /// Nothing to watch: a mapped file cannot be truncated.
    #[derive(Debug)]
    pub(crate) struct Watch;

    impl Watch {
        pub(crate) fn new(_: &[u8]) -> Self {
            Self
        }

        pub(crate) fn lost(&self) -> bool {
            false
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    const BYTES: u64 = 1 << 20;

    fn ones() -> File {
        let file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut &file, &[1; BYTES as usize]).unwrap();
        file
    }

    fn mapped() -> (Mapped, File) {
        let file = ones();
        (Mapped::open(Path::new("in"), file.try_clone().unwrap()).unwrap(), file)
    }

    #[test]
    fn truncated_bytes_are_zeros_and_an_error() {
        let (map, file) = mapped();
        let (kept, _other) = mapped();
        file.set_len(BYTES / 4).unwrap();
        // Eight threads fall off the end at once.
        let sum = || map.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        std::thread::scope(|scope| {
            for thread in (0..8).map(|_| scope.spawn(sum)).collect::<Vec<_>>() {
                assert!(thread.join().unwrap() <= BYTES);
            }
        });
        assert_eq!(sum(), BYTES / 4);
        let message = map.unchanged().unwrap_err().to_string();
        assert!(message.starts_with("in: changed while it was read"), "{message}");
        // The length alone does not decide.
        file.set_len(BYTES).unwrap();
        assert!(map.watch.lost() && map.unchanged().is_err());
        assert!(!kept.watch.lost() && kept.unchanged().is_ok());
    }

    #[test]
    fn lost_bytes_are_an_error_even_if_the_file_seems_the_same() {
        let (mut map, file) = mapped();
        file.set_len(0).unwrap();
        assert_eq!(map[BYTES as usize - 1], 0);
        map.stamp = Stamp::of(&file, Path::new("in")).unwrap();
        let message = map.unchanged().unwrap_err().to_string();
        assert!(message.contains("in: cannot be read to its end"), "{message}");
    }

    #[test]
    fn bytes_that_could_not_be_written_are_an_error() {
        for cut in [false, true] {
            let file = ones();
            let mut map = MappedMut::open(&file, Path::new("out")).unwrap();
            if cut {
                file.set_len(BYTES / 4).unwrap();
            }
            map.map.fill(2);
            match map.finish(Path::new("out")) {
                Ok(()) => assert!(!cut),
                Err(failure) => assert!(cut && failure.to_string().contains("out: cannot write all"), "{failure}"),
            }
        }
    }
}
