//! Writing clipped copies of files piece by piece, with memory for one piece a thread.
//!
//! ```text
//! for each piece of each file, from first to last, on every thread:
//!     if the clip does not change it: write it from the mapped input
//!     else:                           copy or widen it into the thread's buffer, clip it there, write the buffer
//! ```

use std::fs::File;
use std::io;
use std::path::Path;

use gradclip::{Tensor, TensorMut};
use indicatif::ProgressBar;
use rayon::prelude::*;

use crate::failure::Failure;
use crate::groups::Decided;
use crate::layout::{FileLayout, GradientPiece, Piece};

/// Bytes in a piece; a multiple of 8, so that no element is cut. Milliseconds to write 512 MiB, all of it clipped, from
/// page cache to page cache on two cores of an AMD EPYC (family 26), medians of 12: 64 KiB 255, 128 KiB 207, 256 KiB 206,
/// 512 KiB 176, 1 MiB 145, 2 MiB 159, 4 MiB 674.
///
/// Advice to the kernel on the mapped input was measured and is not given: reading 2 GiB from disk took 0.9 s without any,
/// 1.3 s with `MADV_SEQUENTIAL` or `MADV_WILLNEED`, 2.3 s with `MADV_POPULATE_READ`; from the page cache, all the same.
const PIECE: usize = 1 << 20;

/// Fills files as their layouts describe. `decided` holds for the gradients of all files, in order. Errors name the path
/// beside the file. Runs on the threads of the current pool.
pub(crate) fn write<'a>(
    outputs: impl Iterator<Item = (&'a FileLayout<'a>, &'a File, &'a Path)> + Clone + Send,
    decided: &Decided,
    progress: &ProgressBar,
) -> Result<(), Failure> {
    for (layout, file, path) in outputs.clone() {
        file.set_len(layout.len()).map_err(Failure::io(path, "write"))?;
    }
    let mut gradients = 0;
    let pieces = outputs.flat_map(|(layout, file, path)| {
        let before = gradients;
        gradients += layout.gradients();
        layout.pieces(PIECE).map(move |piece| (before, piece, file, path))
    });
    pieces.par_bridge().try_for_each_init(
        || Vec::with_capacity(PIECE),
        |buffer, (before, Piece { offset, bytes, gradient }, file, path)| {
            let mut clipped = bytes;
            if let Some(GradientPiece { number, from, to, first }) = gradient {
                let (decided, tensor) = decided.of(before + number);
                let len = bytes.len() / from.size();
                let unchanged = decided.is_unchanged(tensor, first..first + len as u64)?;
                if !unchanged || from != to {
                    buffer.resize(len * to.size(), 0);
                    let mut piece = TensorMut::from_bytes(to, buffer)?;
                    Tensor::from_bytes(from, bytes)?.widen_into(&mut piece)?;
                    if !unchanged {
                        decided.apply(tensor, first, &mut piece)?;
                    }
                    clipped = buffer;
                }
            }
            // Written rather than mapped: a full disk is then an error, not a signal.
            write_all_at(file, clipped, offset).map_err(Failure::io(path, "write"))?;
            progress.inc(clipped.len() as u64);
            Ok(())
        },
    )
}

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => (bytes, offset) = (&bytes[written..], offset + written as u64),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
