//! The MPI calls of a group. All go through [`Calls`], so that none is made where MPI does not allow it.

use std::ffi::{c_char, c_int};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gradclip::Error;
use mpi::ffi::{self, MPI_Comm, MPI_Message, MPI_Request, MPI_Status};
use mpi::{Threading, environment};

/// Held during every MPI call of this crate, by any group: `MPI_THREAD_SERIALIZED` allows one at a time. It holds the number of the
/// last group, by which messages of a dropped group are not taken for those of another.
static CALLS: Mutex<c_int> = Mutex::new(0);

/// How many tags MPI has at least.
const TAGS: c_int = 32_768;

/// Permission to call MPI from this thread now: MPI runs, the threading level allows it, and no other thread is in a call of
/// this crate.
pub(crate) struct Calls(MutexGuard<'static, c_int>);

/// A communicator that only one group uses, and whose errors are returned.
#[derive(Debug)]
pub(crate) struct Communicator {
    handle: MPI_Comm,
    /// The tag of every message. If a communicator is freed while a message is still in transit, MPI may give its number to the
    /// next one, which would receive that message.
    tag: c_int,
}

// SAFETY: The handle is an integer or a pointer into MPI's own memory, and is given to MPI only while `Calls` is held,
// which MPI allows from any thread (`Calls::enter` has looked).
unsafe impl Send for Communicator {}
// SAFETY: The same. A shared reference can do nothing without `Calls`, of which there is one at a time.
unsafe impl Sync for Communicator {}

/// A message in transit, with the memory that MPI reads or writes meanwhile.
///
/// [`Calls::finish`] frees that memory once MPI has finished. If the transfer is dropped before, the memory is leaked.
#[derive(Debug)]
pub(crate) struct Transfer {
    request: MPI_Request,
    /// A boxed slice, as a pointer because MPI holds one too.
    bytes: NonNull<[u8]>,
}

// SAFETY: The request is, as a communicator's handle is, given to MPI only while `Calls` is held, from whatever thread;
// the bytes are owned.
unsafe impl Send for Transfer {}

impl Calls {
    /// Waits until no other thread is in a call of this crate.
    pub(crate) fn enter() -> Result<Self, Error> {
        let held = CALLS.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = |why: &str| Err(Error::ProcessGroup(why.to_owned()));
        // These may be asked at any time, from any thread.
        if !environment::is_initialized() {
            return refused(
                "MPI is not initialised; keep what mpi::initialize_with_threading returns while there are groups",
            );
        }
        if environment::is_finalized() {
            return refused(
                "MPI was finalised; keep what mpi::initialize_with_threading returns while there are groups",
            );
        }
        match environment::threading_support() {
            Threading::Single => refused(
                "MPI was initialised for a single thread; ask for mpi::Threading::Serialized by \
                 mpi::initialize_with_threading",
            ),
            Threading::Funneled if !is_main_thread() => refused(
                "MPI was initialised for calls from its main thread alone (Funneled), and this is another; ask for \
                 mpi::Threading::Serialized, or clip from the main thread",
            ),
            Threading::Funneled | Threading::Serialized | Threading::Multiple => Ok(Self(held)),
        }
    }

    /// A communicator over the same processes. All of them must ask, and wait for each other.
    pub(crate) fn duplicate(&mut self, communicator: &impl mpi::traits::Communicator) -> Result<Communicator, Error> {
        // SAFETY: `MPI_COMM_NULL` is a constant of the library.
        let mut handle = unsafe { ffi::RSMPI_COMM_NULL };
        // SAFETY: MPI runs and may be called (`self`). The handle is of a live communicator, as long as it is borrowed
        // (`AsRaw`), and the other points to where a handle is written.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(communicator.as_raw(), &raw mut handle) })?;
        // SAFETY: As above, and `handle` is live: it was made just now. The handler is one of the library's constants.
        check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(handle, ffi::RSMPI_ERRORS_RETURN) })?;
        // Higher than that of any group before that has one of these processes.
        let (mine, mut number) = (self.0.wrapping_add(1).max(1), 0);
        // SAFETY: As above. One integer is read and one written, of the datatype that is named.
        let code = unsafe {
            let (from, to) = ((&raw const mine).cast(), (&raw mut number).cast());
            ffi::MPI_Allreduce(from, to, 1, ffi::RSMPI_INT32_T, ffi::RSMPI_MAX, handle)
        };
        check("MPI_Allreduce", code)?;
        *self.0 = number;
        Ok(Communicator { handle, tag: number % TAGS })
    }

    /// Begins to send. The receiver need not be waiting.
    pub(crate) fn send(&self, communicator: &Communicator, to: u32, message: &[u8]) -> Result<Transfer, Error> {
        let (Ok(count), Ok(rank)) = (c_int::try_from(message.len()), c_int::try_from(to)) else {
            return Err(Error::ProcessGroup(format!(
                "a message of {} bytes is more than MPI takes in one piece (2 GiB); use fewer segments",
                message.len()
            )));
        };
        let bytes = owned(message.into());
        // SAFETY: `MPI_REQUEST_NULL` is a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: MPI runs and may be called (`self`); the communicator is live until it is dropped. It reads `count`
        // bytes, all that there are, until the request is complete; they are not moved, written or freed before
        // (`Transfer`).
        let code = unsafe {
            let first = bytes.as_ptr().cast_const().cast();
            ffi::MPI_Isend(
                first,
                count,
                ffi::RSMPI_UINT8_T,
                rank,
                communicator.tag,
                communicator.handle,
                &raw mut request,
            )
        };
        // On an error the bytes are leaked, because MPI may still read them.
        check("MPI_Isend", code)?;
        Ok(Transfer { request, bytes })
    }

    /// Begins to receive the next message from a rank, if there is one.
    pub(crate) fn receive(&self, communicator: &Communicator, from: u32) -> Result<Option<Transfer>, Error> {
        let rank = c_int::try_from(from).map_err(|_| Error::ProcessGroup(format!("there is no rank {from}")))?;
        let mut is_there = 0;
        // SAFETY: `MPI_MESSAGE_NULL` is a constant of the library.
        let mut message: MPI_Message = unsafe { ffi::RSMPI_MESSAGE_NULL };
        // SAFETY: A C struct of integers, for which zeros are as good as anything.
        let mut status: MPI_Status = unsafe { std::mem::zeroed() };
        // SAFETY: MPI runs and may be called (`self`); the communicator is live until it is dropped. The others are
        // pointers to where an answer of their type is written.
        let code = unsafe {
            let answer = (&raw mut is_there, &raw mut message, &raw mut status);
            ffi::MPI_Improbe(rank, communicator.tag, communicator.handle, answer.0, answer.1, answer.2)
        };
        check("MPI_Improbe", code)?;
        if is_there == 0 {
            return Ok(None);
        }
        let mut count = 0;
        // SAFETY: The status is that of the probe, and the datatype the library's for bytes.
        let code = unsafe { ffi::MPI_Get_count(&raw const status, ffi::RSMPI_UINT8_T, &raw mut count) };
        check("MPI_Get_count", code)?;
        let Ok(len) = usize::try_from(count) else {
            return Err(Error::ProcessGroup(format!("MPI cannot tell the length of a message from rank {from}")));
        };
        let bytes = owned(vec![0; len].into());
        // SAFETY: `MPI_REQUEST_NULL` is a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: As for the probe, whose message this is, received once. It writes `count` bytes at most, all that
        // there are, until the request is complete; they are not moved, read or freed before (`Transfer`).
        let code = unsafe {
            let first = bytes.as_ptr().cast();
            ffi::MPI_Imrecv(first, count, ffi::RSMPI_UINT8_T, &raw mut message, &raw mut request)
        };
        check("MPI_Imrecv", code)?;
        Ok(Some(Transfer { request, bytes }))
    }

    /// The message, once it was sent or received.
    pub(crate) fn finish(&self, mut transfer: Transfer) -> Result<Result<Box<[u8]>, Transfer>, Error> {
        let mut is_done = 0;
        // SAFETY: MPI runs and may be called (`self`). The request is active: one that is complete is not kept. No
        // status is wanted.
        let code = unsafe { ffi::MPI_Test(&raw mut transfer.request, &raw mut is_done, ffi::RSMPI_STATUS_IGNORE) };
        check("MPI_Test", code)?;
        if is_done == 0 {
            return Ok(Err(transfer));
        }
        // SAFETY: They come from a box (`owned`), nobody has freed them (here is the only place, and takes the
        // transfer), and MPI is done with them.
        Ok(Ok(unsafe { Box::from_raw(transfer.bytes.as_ptr()) }))
    }

    /// Lets a transfer end by itself; its memory is leaked.
    pub(crate) fn abandon(&self, mut transfer: Transfer) {
        // SAFETY: MPI runs and may be called (`self`), and the request is active. It goes on, and its bytes are never
        // freed.
        let _ = unsafe { ffi::MPI_Request_free(&raw mut transfer.request) };
    }

    /// Frees a communicator. MPI keeps it while messages are in transit.
    pub(crate) fn free(&self, communicator: &mut Communicator) {
        // SAFETY: MPI runs and may be called (`self`). The communicator is live: this is called where it is dropped.
        let _ = unsafe { ffi::MPI_Comm_free(&raw mut communicator.handle) };
    }
}

/// The bytes of a box, as a pointer that MPI may hold too.
fn owned(bytes: Box<[u8]>) -> NonNull<[u8]> {
    NonNull::from(Box::leak(bytes))
}

fn is_main_thread() -> bool {
    let mut is_main = 0;
    // SAFETY: MPI runs, and this may be asked from any thread. The pointer is to where the answer is written.
    let code = unsafe { ffi::MPI_Is_thread_main(&raw mut is_main) };
    code == SUCCESS && is_main != 0
}

const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;

/// Turns an error code into an error with the message of MPI.
fn check(call: &str, code: c_int) -> Result<(), Error> {
    if code == SUCCESS {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len = 0;
    // SAFETY: MPI runs and may be called, because it was just now. The text has the length that MPI writes at most.
    let known = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &raw mut len) } == SUCCESS;
    let written = usize::try_from(len).ok().filter(|_| known).and_then(|len| text.get(..len)).unwrap_or_default();
    let message = String::from_utf8_lossy(written);
    Err(Error::ProcessGroup(format!("{call} failed with code {code}: {}", message.trim())))
}
