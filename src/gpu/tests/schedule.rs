//! How work is divided.

use super::super::readback::PARTIAL_BYTES;
use super::super::schedule::words_at_a_time;
use super::super::table::Piece;
use super::super::tuning::{BUFFERS_OF_CHUNKS, HARDWARE, SOFTWARE, STAGING_BYTES};
use crate::Dtype;
use crate::segment::{By, SegmentLayout};

/// Plans half a terabyte in loads of 16 MiB: its partials fit into the smallest default binding.
#[test]
fn partials_of_any_number_of_buffers_have_room() {
    let len = STAGING_BYTES / 4;
    let piece = |buffer| {
        let layout = SegmentLayout { by: By::Whole, columns: len, segment: 0, first: 0 };
        Piece { buffer, dtype: Dtype::F32, start: 0, len, tensor: 0, first_element: 0, layout }
    };
    for buffers in [1, 2, 255, 256, 257, 1 << 15] {
        let pieces: Vec<_> = (0..buffers).map(piece).collect();
        let words = words_at_a_time(pieces.iter(), true);
        for tuning in [SOFTWARE, HARDWARE] {
            let partials = len.div_ceil(tuning.chunk_words(words).into()) * buffers as u64;
            assert!(partials * PARTIAL_BYTES <= 128 << 20, "{partials} of {buffers} buffers");
            let alone = tuning.chunk_words(len);
            assert!(buffers > BUFFERS_OF_CHUNKS as usize || tuning.chunk_words(words) == alone);
        }
        assert_eq!(words_at_a_time(pieces.iter(), false), len * buffers as u64);
    }
}
