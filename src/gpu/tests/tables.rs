//! Tables of every shape that is known to be hard; `tables_hold.rs` checks what they must hold.

use super::super::table::{EdgeRow, Kept, Limits, NOWHERE, Piece, Tables, Use};
use super::super::tuning::HARDWARE;
use super::tables_hold::{check_grid, check_steps, check_sums, check_tables};
use crate::Dtype;
use crate::segment::{By, SegmentLayout};

fn piece(buffer: usize, dtype: Dtype, start: u64, len: u64) -> Piece {
    Piece { buffer, dtype, start, len, tensor: 0, first_element: 0, layout: whole(len, 0) }
}

fn whole(columns: u64, segment: u32) -> SegmentLayout {
    SegmentLayout { by: By::Whole, columns, segment, first: 0 }
}

/// A [`piece`] as a matrix.
fn matrix(by: By, columns: u64, of: Piece) -> Piece {
    Piece { layout: SegmentLayout { by, columns, segment: 0, first: 0 }, ..of }
}

/// [`check_tables`] for a clip, with segments from 0 on.
fn check(pieces: &[Piece], limits: Limits) -> Tables {
    let last = |p: &Piece| match p.layout.by {
        By::Columns => p.layout.segment + p.layout.columns as u32 - 1,
        _ => p.layout.segment_of(p.first_element + p.len.max(1) - 1),
    };
    let segments = pieces.iter().map(|p| last(p) + 1).max().unwrap_or(1);
    check_tables(pieces, segments, false, limits)
}

const SMALL: Limits = Limits {
    chunk_words: 16,
    binding_bytes: 512,
    alignment: 256,
    workgroup: 4,
    lane_row: 6,
    long_row: 16,
    lane_column: 5,
    windows: 1,
};

#[test]
fn every_offset_and_length_is_covered_once() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for start in 0..70 {
            for len in [0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 300, 1000] {
                check(&[piece(0, dtype, start, len)], SMALL);
            }
        }
    }
}

#[test]
fn neighbours_that_share_a_word_have_one_writer() {
    let pieces = [
        Piece { layout: whole(4, 2), ..piece(0, Dtype::F16, 1, 4) },
        Piece { layout: whole(1, 1), ..piece(0, Dtype::BF16, 5, 1) },
        Piece { layout: whole(5, 3), ..piece(0, Dtype::F16, 6, 5) },
        Piece { layout: whole(3, 0), ..piece(0, Dtype::F32, 6, 3) },
    ];
    let tables = check(&pieces, SMALL);
    let edges = &tables.batches[0].edges;
    assert_eq!(
        edges[..],
        [
            EdgeRow { word: 0, low: NOWHERE, high: 2, dtypes: 1 << 8, window: 0 },
            EdgeRow { word: 2, low: 2, high: 1, dtypes: 1 | 2 << 8, window: 0 },
            EdgeRow { word: 5, low: 3, high: NOWHERE, dtypes: 1, window: 0 },
        ]
    );
}

#[test]
fn a_shared_word_at_the_seam_of_two_windows_has_one_writer() {
    for first_len in 240..260 {
        let pieces = [piece(0, Dtype::F16, 0, first_len), piece(0, Dtype::F16, first_len, 300)];
        check(&pieces, SMALL);
    }
}

#[test]
fn pieces_out_of_address_order_keep_list_order_in_their_slots() {
    let mut pieces = [piece(1, Dtype::F32, 100, 50), piece(0, Dtype::F32, 8, 40), piece(1, Dtype::F32, 0, 20)];
    for (i, p) in pieces.iter_mut().enumerate() {
        p.tensor = i;
    }
    let tables = check(&pieces, SMALL);
    assert_eq!(tables.slots, [9]);
    let rows = tables.each().flat_map(|(.., table)| &table.chunks);
    let mut slots: Vec<_> = rows.map(|row| (row.slot, row.origin)).collect();
    slots.sort_unstable();
    assert_eq!(slots.iter().map(|(_, origin)| *origin).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 1, 1, 2, 2]);
}

#[test]
fn tensors_of_many_buffers_share_batches_and_tasks() {
    for windows in [1, 2, 3, 16] {
        let limits = Limits { windows, ..SMALL };
        let mut pieces = Vec::new();
        for tensor in 0..40 {
            // Tensors of 1 to 11 elements, by turns in 7 buffers, some sharing words.
            let of = piece(tensor % 7, Dtype::F16, (tensor / 7 * 13) as u64, 1 + (tensor % 11) as u64);
            pieces.push(Piece { tensor, ..of });
        }
        let tables = check(&pieces, limits);
        assert_eq!(tables.batches.len(), 7usize.div_ceil(windows));
        let tasks: u32 = tables.each().map(|(.., table)| table.tasks).sum();
        assert_eq!(tables.slots, [tasks]);
        assert!(tasks <= 20, "{tasks} tasks for 40 tensors");
    }
}

#[test]
fn two_thousand_small_tensors_are_two_hundred_tasks() {
    let limits = Limits { chunk_words: 1 << 14, binding_bytes: 128 << 20, windows: 64, ..SMALL };
    let pieces: Vec<_> =
        (0..2000).map(|tensor| Piece { tensor, ..piece(0, Dtype::F32, tensor as u64 * 2100, 2100) }).collect();
    let tables = check(&pieces, limits);
    assert_eq!((tables.batches.len(), tables.slots[0]), (1, 2000u32.div_ceil(7)));
}

#[test]
fn rows_and_columns_of_every_shape() {
    for dtype in [Dtype::F32, Dtype::F16] {
        for by in [By::Rows, By::Columns] {
            for columns in [1, 2, 3, 5, 6, 7, 16, 33, 100] {
                for rows in [1, 2, 5, 6, 11] {
                    for start in [0, 1, 63] {
                        check(&[matrix(by, columns, piece(0, dtype, start, rows * columns))], SMALL);
                    }
                }
            }
        }
    }
}

/// An invocation that scales elements of many rows looks up an outcome for each.
#[test]
fn long_rows_are_runs() {
    for (columns, start, long) in [(32, 0, true), (32, 1, false), (33, 0, false), (31, 0, false), (48, 6, true)] {
        let tables = check(&[matrix(By::Rows, columns, piece(0, Dtype::F16, start, 5 * columns))], SMALL);
        assert_eq!(tables.each().all(|(_, of, ..)| of == Use::Whole), long, "{columns} from {start}");
    }
}

#[test]
fn a_matrix_in_pieces_that_end_within_rows() {
    for by in [By::Rows, By::Columns] {
        for columns in [3, 7, 40] {
            for cut in [1, 2, 7, 8, 41, 80] {
                let total = columns * 5;
                let part = |buffer, first_element: u64, len| Piece {
                    first_element,
                    ..matrix(by, columns, piece(buffer, Dtype::F32, 3, len))
                };
                let cut = cut.min(total - 1);
                check(&[part(0, 0, cut), part(1, cut, total - cut)], SMALL);
            }
        }
    }
}

#[test]
fn examples_over_all_tensors() {
    // Two tensors with three examples each: every segment has slots of both.
    let second = Piece { tensor: 1, ..matrix(By::Rows, 40, piece(1, Dtype::F16, 1, 120)) };
    let tables = check(&[matrix(By::Rows, 2, piece(0, Dtype::F32, 0, 6)), second], SMALL);
    assert!(tables.slots.iter().all(|n| *n >= 2));
}

#[test]
fn every_example_is_added_to_every_sum_once() {
    for (dtype, columns, examples, cut) in [
        (Dtype::F32, 5u64, 3u64, 15u64),
        (Dtype::F16, 7, 9, 20),
        (Dtype::BF16, 100, 4, 250),
        (Dtype::F32, 60, 40, 61),
        (Dtype::F16, 60, 0, 0),
    ] {
        let len = columns * examples;
        let into = piece(2, Dtype::F32, 9, columns);
        let part = |buffer, first_element, len| Piece {
            first_element,
            ..matrix(By::Rows, columns, piece(buffer, dtype, 2, len))
        };
        let pairs = [(part(0, 0, cut), into), (part(1, cut, len - cut), into)];
        check_sums(&pairs[..if cut < len { 2 } else { 1 }], SMALL);
    }
}

/// A device that binds 64 KiB, the smallest size that is accepted, and kernels of many invocations.
#[test]
fn short_rows_of_a_large_workgroup_fit_a_small_binding() {
    let limits = Limits::new(&HARDWARE, 1 << 20, (1 << 16, 256), 1);
    for columns in [1, 16, 63, 64] {
        check(&[matrix(By::Rows, columns, piece(0, Dtype::F32, 1, columns * 5000))], limits);
    }
}

#[test]
fn workgroups_are_laid_out_in_at_most_two_dimensions() {
    for workgroups in [0, 1, 7, 8, 9, 63, 64, 65, u32::MAX] {
        check_grid(workgroups, 8);
        check_grid(workgroups, 65_535);
        check_grid(workgroups, u32::MAX);
    }
}

#[test]
fn sizes_beyond_this_machine_add_up() {
    // 2^33 elements of float32 in buffers just below 2 GiB, as drivers give them, with 128 MiB bindings.
    let limits = Limits {
        chunk_words: 1 << 20,
        binding_bytes: 128 << 20,
        alignment: 256,
        workgroup: 256,
        lane_row: 64,
        long_row: 4096,
        lane_column: 256,
        windows: 1,
    };
    let each = (1u64 << 29) - 64;
    let mut first_element = 0;
    let mut pieces = Vec::new();
    while first_element < 1 << 33 {
        let len = each.min((1 << 33) - first_element);
        pieces.push(Piece { first_element, ..piece(pieces.len(), Dtype::F32, 0, len) });
        first_element += len;
    }
    let tables = check(&pieces, limits);
    assert!(tables.batches.len() >= 256);
    assert!(tables.slots[0] >= 1 << 13);
    // One piece of 2^36 bytes in a single buffer, with the largest binding there is.
    let limits = Limits { binding_bytes: (1 << 31) - 256, ..limits };
    let huge = piece(0, Dtype::BF16, 3, 1 << 35);
    assert_eq!(check(&[huge], limits).origins.len(), 17);
    check(&[matrix(By::Rows, (1 << 32) + 5, huge)], limits);
    check(&[matrix(By::Rows, 1 << 25, Piece { len: 1 << 33, ..huge })], limits);
}

#[test]
fn steps_hold_at_every_offset_and_length() {
    // Blocks that a parameter fits into, fills exactly, or needs several of.
    for (dtype, remainders) in [(Dtype::F32, false), (Dtype::F16, false), (Dtype::BF16, true)] {
        for start in 0..10 {
            for len in [0, 1, 2, 3, 31, 32, 33, 127, 128, 300] {
                for (floats, most) in [(0, 64), (1, 64), (2, 67), (3, 1024)] {
                    let kept = Kept { floats, remainders, upper: remainders && start % 2 == 1 };
                    let gradients = [piece(0, Dtype::BF16, 7, len), matrix(By::Rows, 7, piece(0, Dtype::F32, 900, 21))];
                    let parameters =
                        [piece(1, dtype, start, len), matrix(By::Rows, 7, piece(1, dtype, start + len, 21))];
                    let [first, mut second] = parameters;
                    second.tensor = 1;
                    let gradients = [gradients[0], Piece { tensor: 1, ..gradients[1] }];
                    let upper = remainders && (start + len) % 2 == 1;
                    check_steps(
                        &gradients,
                        &[first, second],
                        &[(len, kept), (21, Kept { upper, ..kept })],
                        most,
                        SMALL,
                    );
                }
            }
        }
    }
}
