//! The norms of a safetensors file that is read piece by piece: what `gradclip norm` shows of a file.

use std::ops::Range;

use gradclip::{Clip, Clipper, Dtype, Error, NormAccumulator, NormType, Tensor};
use gradclip_common::description::{measuring, share_of};
use gradclip_common::header::Entry;
use gradclip_common::plot::{self, TensorNorm};
use gradclip_common::text::{grouped, number, percent, plural, shown};
use serde::Serialize;

/// How many bytes are read at a time.
const READ: u64 = 8 << 20;

/// How many rows the table has.
const TOP: usize = 100;

/// How many norms are drawn: a hostile header may name a million tensors.
const DRAWN: usize = 1000;

/// The gradients of a file, and their norms so far.
#[derive(Debug)]
pub struct FileNorms {
    tensors: Vec<TensorSoFar>,
    total: NormAccumulator,
    /// How many tensors are no gradients.
    others: usize,
    /// The first tensor that may be a gradient but whose dtype has no norm here.
    unsupported: Option<String>,
}

#[derive(Debug)]
struct TensorSoFar {
    entry: Entry,
    dtype: Dtype,
    norm: NormAccumulator,
    zeros: u64,
    non_finite: u64,
    first_non_finite: Option<u64>,
}

/// Bytes of the file that are read at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// Where they lie in the file.
    pub bytes: Range<u64>,
    /// The pieces of tensors that they hold, one after another.
    pieces: Vec<Piece>,
}

/// A piece of a tensor: whole elements.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    tensor: usize,
    first: u64,
    bytes: u64,
}

/// What the page shows of a file.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The norm of all gradients.
    pub total_norm: String,
    /// How many elements are not finite and where the first is.
    pub non_finite: Option<String>,
    /// How many elements were measured, and in how many tensors.
    pub elements: String,
    /// What was not measured.
    pub left_out: Option<String>,
    /// How long it took.
    pub time: String,
    /// The head of the table.
    pub rows_are: String,
    /// The tensors with the largest norms; those that are not finite come first.
    pub rows: Vec<Row>,
    /// A plot of all norms.
    pub plot: String,
}

/// A tensor.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name, with control characters escaped.
    pub name: String,
    /// Its shape and dtype.
    pub what: String,
    /// Its norm.
    pub norm: String,
    /// Its share in the square of the total norm.
    pub share: String,
    /// How many elements are not finite.
    pub non_finite: String,
    /// The index of the first of them.
    pub first: String,
    /// How many elements are 0.
    pub zeros: String,
}

fn clip() -> Clip {
    measuring(Clip::norm(f64::INFINITY))
}

impl FileNorms {
    /// Begins with the entries of a header.
    ///
    /// # Errors
    /// A sentence if a tensor is complex, because the norm would miss it.
    pub fn new(entries: Vec<Entry>) -> Result<Self, String> {
        let total = NormAccumulator::new(&clip()).map_err(|error| text(&error))?;
        let mut all = Self { tensors: Vec::new(), total: total.clone(), others: 0, unsupported: None };
        for entry in entries {
            if entry.may_be_gradient() && entry.dtype.is_none() {
                if !entry.is_unsupported() {
                    return Err(format!("tensor {:?} is complex: save its real and imaginary parts", entry.name));
                }
                let of = || format!("{} ({})", shown(&entry.name), entry.kind);
                all.unsupported.get_or_insert_with(of);
            }
            match entry.dtype {
                None => all.others += 1,
                Some(dtype) => all.tensors.push(TensorSoFar {
                    entry,
                    dtype,
                    norm: total.clone(),
                    zeros: 0,
                    non_finite: 0,
                    first_non_finite: None,
                }),
            }
        }
        Ok(all)
    }

    /// What is to be read, in the order of the file.
    #[must_use]
    pub fn reads(&self) -> Vec<Read> {
        let mut reads: Vec<Read> = Vec::new();
        for (tensor, TensorSoFar { entry, dtype, .. }) in self.tensors.iter().enumerate() {
            let (size, mut start) = (dtype.size() as u64, entry.bytes.start);
            while start < entry.bytes.end {
                let room = |read: &Read| READ.saturating_sub(read.bytes.end - read.bytes.start) / size * size;
                let into = reads.last_mut().filter(|read| read.bytes.end == start && room(read) > 0);
                let end = entry.bytes.end.min(start + into.as_deref().map_or(READ, room));
                let first = (start - entry.bytes.start) / size;
                let piece = Piece { tensor, first, bytes: end - start };
                match into {
                    Some(read) => {
                        read.bytes.end = end;
                        read.pieces.push(piece);
                    }
                    None => reads.push(Read { bytes: start..end, pieces: vec![piece] }),
                }
                start = end;
            }
        }
        reads
    }

    /// Measures what was read.
    ///
    /// # Errors
    /// A sentence if it is shorter than what was to be read.
    pub fn add(&mut self, read: &Read, mut bytes: &[u8]) -> Result<(), String> {
        for piece in &read.pieces {
            let Some((own, rest)) = bytes.split_at_checked(piece.bytes as usize) else {
                return Err("the file became shorter while it was read".into());
            };
            bytes = rest;
            self.piece(piece, own).map_err(|error| text(&error))?;
        }
        Ok(())
    }

    fn piece(&mut self, piece: &Piece, bytes: &[u8]) -> Result<(), Error> {
        let tensor = &mut self.tensors[piece.tensor];
        let view = Tensor::from_bytes(tensor.dtype, bytes)?;
        let mut norm = NormAccumulator::new(&clip())?;
        Clipper::cpu().accumulate(&mut norm, &[view.named(&tensor.entry.name)])?;
        let counts = view.counts();
        tensor.zeros += counts.zeros;
        tensor.non_finite += counts.non_finite;
        let first = counts.first_non_finite.map(|index| piece.first + index);
        tensor.first_non_finite = tensor.first_non_finite.or(first);
        self.total.merge(&norm)?;
        tensor.norm.merge(&norm)
    }

    /// What there is to show, once everything was read. `bytes` were read in so many seconds.
    ///
    /// # Errors
    /// A sentence if the library refuses it.
    pub fn report(&self, file: &str, bytes: u64, seconds: f64) -> Result<Report, String> {
        let total = self.total.report().map_err(|error| text(&error))?.total_norm;
        let norm = |tensor: &TensorSoFar| tensor.norm.report().map(|report| report.total_norm);
        let norms: Vec<_> = self.tensors.iter().map(norm).collect::<Result<_, _>>().map_err(|error| text(&error))?;
        let mut order: Vec<_> = (0..norms.len()).collect();
        // A NaN may carry a sign.
        order.sort_by(|a, b| norms[*b].abs().total_cmp(&norms[*a].abs()));
        let rows: Vec<_> = order.iter().take(TOP).map(|i| self.tensors[*i].row(norms[*i], total)).collect();
        // The largest, in the order of the file.
        let mut drawn: Vec<_> = order.iter().copied().take(DRAWN).collect();
        drawn.sort_unstable();
        let row = |i: &usize| TensorNorm {
            label: shown(&self.tensors[*i].entry.name),
            norm: norms[*i],
            non_finite: self.tensors[*i].non_finite,
        };
        let drawn: Vec<_> = drawn.iter().map(row).collect();
        let largest = if norms.len() > DRAWN { "Largest L2" } else { "L2" };
        let bad: u64 = self.tensors.iter().map(|tensor| tensor.non_finite).sum();
        let first = self.tensors.iter().find_map(|tensor| Some((&tensor.entry.name, tensor.first_non_finite?)));
        let found = |(name, index): (&String, u64)| {
            let count = plural(bad, "non-finite element");
            format!("{count}, the first at index {} of tensor \"{}\"", grouped(index), shown(name))
        };
        let elements: u64 = self.tensors.iter().map(TensorSoFar::elements).sum();
        let tensors = plural(self.tensors.len() as u64, "tensor");
        let others = (self.others > 0).then(|| {
            let first = self.unsupported.as_ref().map(|first| format!(", the first that may be a gradient: {first}"));
            format!("{} that have no norm here{}", plural(self.others as u64, "other"), first.unwrap_or_default())
        });
        Ok(Report {
            total_norm: format!("{} (L2)", number(total, 9)),
            non_finite: first.map(found),
            elements: format!("{} in {tensors}", grouped(elements)),
            left_out: others,
            time: format!("{} s, {} GB/s", number(seconds, 3), number(bytes as f64 / 1e9 / seconds.max(1e-9), 3)),
            rows_are: format!("largest {} of {tensors}", rows.len()),
            rows,
            plot: plot::draw(&format!("{largest} norms in {}", shown(file)), &drawn, total),
        })
    }
}

impl TensorSoFar {
    fn elements(&self) -> u64 {
        self.entry.size() / self.dtype.size() as u64
    }

    fn row(&self, norm: f64, total: f64) -> Row {
        Row {
            name: shown(&self.entry.name),
            what: format!("{:?} {}", self.entry.shape, self.dtype),
            norm: number(norm, 6),
            share: percent(share_of(norm, total, NormType::L2)),
            non_finite: grouped(self.non_finite),
            first: self.first_non_finite.map_or_else(String::new, grouped),
            zeros: percent(self.zeros as f64 / self.elements() as f64),
        }
    }
}

fn text(error: &Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use gradclip_common::header;

    use super::*;

    /// A file of these tensors.
    fn file(tensors: &[(&str, &str, &[u8])]) -> Vec<u8> {
        let (mut pairs, mut data) = (Vec::new(), Vec::new());
        for (name, dtype, bytes) in tensors {
            let size = if *dtype == "F32" || *dtype == "I32" { 4 } else { 2 };
            let (start, end) = (data.len(), data.len() + bytes.len());
            let shape = bytes.len() / size;
            pairs.push(format!(
                r#"{}:{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#,
                serde_json::json!(name)
            ));
            data.extend_from_slice(bytes);
        }
        let header = format!("{{{}}}", pairs.join(","));
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
    }

    fn measured(file: &[u8]) -> Report {
        let (entries, _) = header::parse(file).expect("valid");
        let mut norms = FileNorms::new(entries).expect("supported");
        for read in norms.reads() {
            let bytes = &file[read.bytes.start as usize..read.bytes.end as usize];
            norms.add(&read, bytes).expect("all there");
        }
        norms.report("f", file.len() as u64, 0.5).expect("valid")
    }

    #[test]
    fn a_file_read_in_pieces_has_the_norms_of_the_whole() {
        // Longer than two reads, behind a tensor of odd length, so that pieces begin and end inside of tensors.
        let long: Vec<u8> = (0..5u32 << 20).flat_map(|i| ((i % 1000) as f32 - 500.0).to_le_bytes()).collect();
        let mut bad = long[..12].to_vec();
        bad[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
        let half: Vec<u8> = [0x3c00u16, 0, 0x8000].iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let whole =
            file(&[("half", "F16", &half), ("long", "F32", &long), ("ids", "I32", &[1; 8]), ("b\n", "F32", &bad)]);
        let exact = (0..5u64 << 20).map(|i| ((i % 1000) as f64 - 500.0).powi(2)).sum::<f64>().sqrt();
        let report = measured(&whole);
        assert_eq!(report.total_norm, "NaN (L2)");
        assert_eq!(report.non_finite.as_deref(), Some("1 non-finite element, the first at index 2 of tensor \"b\\n\""));
        assert_eq!(report.elements, "5,242,886 in 3 tensors");
        assert_eq!(report.left_out.as_deref(), Some("1 other that have no norm here"));
        let row = |name: &str| report.rows.iter().find(|row| row.name == name).expect("a row");
        assert_eq!((row("long").norm.as_str(), row("long").zeros.as_str()), (number(exact, 6).as_str(), "0.1%"));
        assert_eq!((row("half").norm.as_str(), row("half").zeros.as_str()), ("1", "66.7%"));
        assert_eq!((report.rows[0].name.as_str(), report.rows[0].first.as_str()), ("b\\n", "2"));
        assert!(report.plot.contains("1 non-finite"), "{}", report.plot);
    }

    #[test]
    fn no_read_cuts_an_element_and_all_are_read_once() {
        let (a, b) = (vec![0; 3 * READ as usize / 2 + 2], vec![0; 4 * 1_000_003]);
        let whole = file(&[("a", "BF16", &a), ("b", "F32", &b), ("e", "F32", &[])]);
        let (entries, _) = header::parse(&whole).expect("valid");
        let start = entries[0].bytes.start;
        let reads = FileNorms::new(entries).expect("supported").reads();
        assert_eq!(reads[0].bytes.start, start);
        assert!(reads.windows(2).all(|pair| pair[0].bytes.end == pair[1].bytes.start), "{reads:?}");
        assert_eq!(reads.last().map(|read| read.bytes.end), Some(whole.len() as u64));
        assert!(reads.iter().all(|read| read.bytes.end - read.bytes.start <= READ), "{reads:?}");
        let pieces = |tensor| reads.iter().flat_map(|read| &read.pieces).filter(move |piece| piece.tensor == tensor);
        for (tensor, size, bytes) in [(0, 2, a.len()), (1, 4, b.len())] {
            let mut next = 0;
            for piece in pieces(tensor) {
                assert_eq!((piece.first * size, piece.bytes % size), (next, 0));
                next += piece.bytes;
            }
            assert_eq!(next, bytes as u64);
        }
    }

    #[test]
    fn of_very_many_tensors_the_largest_are_drawn() {
        let names: Vec<_> = (0..=DRAWN).map(|i| format!("t{i}")).collect();
        let bytes: Vec<_> = (0..=DRAWN).map(|i| (i as f32).to_le_bytes()).collect();
        let tensors: Vec<_> = names.iter().zip(&bytes).map(|(name, bytes)| (&**name, "F32", &bytes[..])).collect();
        let report = measured(&file(&tensors));
        assert_eq!((report.rows.len(), report.rows[0].name.as_str()), (TOP, "t1000"));
        assert!(report.plot.contains("Largest L2 norms") && report.plot.contains("<title>t1: "), "{}", report.plot);
        assert!(!report.plot.contains("<title>t0: "), "{}", report.plot);
    }

    #[test]
    fn what_cannot_be_measured_is_said() {
        let mut complex = file(&[("z", "F32", &[0; 8])]);
        let at = complex.windows(3).position(|bytes| bytes == b"F32").expect("there");
        complex[at..at + 3].copy_from_slice(b"C64");
        let text = String::from_utf8_lossy(&complex).replace("[2]", "[1]");
        let (entries, _) = header::parse(text.as_bytes()).expect("valid");
        assert!(FileNorms::new(entries).is_err_and(|why| why.contains("complex")));

        let whole = file(&[("w", "F32", &[0; 8])]);
        let (entries, _) = header::parse(&whole).expect("valid");
        let mut norms = FileNorms::new(entries).expect("supported");
        let read = norms.reads().swap_remove(0);
        assert!(norms.add(&read, &[0; 4]).is_err_and(|why| why.contains("shorter")));
        let empty = measured(&file(&[]));
        assert_eq!((empty.total_norm.as_str(), empty.elements.as_str()), ("0 (L2)", "0 in 0 tensors"));
    }
}
