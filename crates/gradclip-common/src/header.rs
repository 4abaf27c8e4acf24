//! The header of a safetensors file: where each tensor is.
//!
//! ```text
//! file    = length of the header (8 bytes, little-endian), header (JSON), data
//! header  = { "name": { "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24] }, ..., "__metadata__": { ... } }
//! ```
//!
//! Everything is checked here: names are unique, and the tensors cover the data without overlaps and gaps. So nothing that is
//! read later can be outside the file, and nothing is written twice. The crate `safetensors` accepts a name twice and does
//! not say which tensor is wrong; only its list of dtypes is used.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use gradclip::Dtype;
use serde::de::value::{Error as DtypeError, StrDeserializer};
use serde::de::{Deserialize, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::json;
use serde_json::value::RawValue;

/// The longest header that readers of the format accept.
pub const MAX_HEADER: u64 = 100_000_000;

/// The key of the metadata.
const METADATA: &str = "__metadata__";

/// One tensor of a file.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// The dtype in the header.
    pub kind: safetensors::Dtype,
    /// The dtype as which it is clipped; `None` for all others, and for those that are left out, which pass through.
    pub dtype: Option<Dtype>,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where its bytes are in the file, which may be longer than memory.
    pub bytes: Range<u64>,
    /// Whether it passes through because others were selected.
    pub left_out: bool,
}

/// Reads the header of a whole file: its entries in the order of their data, and the text of its metadata.
///
/// # Errors
/// A sentence about the file, without its name.
pub fn parse(file: &[u8]) -> Result<(Vec<Entry>, Option<String>), String> {
    let length = length(file, file.len() as u64)?;
    entries(&file[8..8 + length as usize], file.len() as u64)
}

/// The length of the header, given at least the first 8 bytes of a file of `size` bytes, or all if there are fewer.
///
/// # Errors
/// As [`parse`].
pub fn length(start: &[u8], size: u64) -> Result<u64, String> {
    let hint = "it is truncated, or not a safetensors file";
    let Some(length) = start.first_chunk::<8>().filter(|_| size >= 8) else {
        return Err(format!("the file has {size} bytes, too few for a header: {hint}"));
    };
    let (length, rest) = (u64::from_le_bytes(*length), size - 8);
    if length > rest {
        return Err(format!("the header claims {length} bytes, but only {rest} follow: {hint}"));
    }
    if length > MAX_HEADER {
        return Err(format!("the header claims {length} bytes, more than the {MAX_HEADER} that the format allows"));
    }
    Ok(length)
}

/// Reads the header alone, without its length, of a file of `size` bytes. As [`parse`].
///
/// # Errors
/// As [`parse`].
pub fn entries(header: &[u8], size: u64) -> Result<(Vec<Entry>, Option<String>), String> {
    let data = size.saturating_sub(8 + header.len() as u64);
    let Pairs(tensors) = serde_json::from_slice::<Pairs<&RawValue>>(header).map_err(|error| {
        format!("the header is not valid JSON ({error}): the file is damaged, or not a safetensors file")
    })?;
    if let Some(name) = duplicate(&tensors) {
        return Err(format!("the header lists tensor {name:?} twice: write the file again with unique names"));
    }
    let (metadata, tensors): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|(name, _)| name == METADATA);
    if let Some((_, text)) = metadata.first() {
        serde_json::from_str::<Option<Pairs<String>>>(text.get())
            .map_err(|error| format!("{METADATA:?} must be an object of strings ({error})"))?;
    }
    let mut entries = tensors
        .into_iter()
        .map(|(name, tensor)| entry(&name, tensor, data).map_err(|problem| format!("tensor {name:?}: {problem}")))
        .collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|entry| (entry.bytes.start, entry.bytes.end));
    cover(&entries, data)?;
    for entry in &mut entries {
        entry.bytes.start += size - data;
        entry.bytes.end += size - data;
    }
    Ok((entries, metadata.first().map(|(_, text)| text.to_string())))
}

/// A header of these entries, padded so that the data behind it are aligned.
#[must_use]
pub fn compose<'a>(entries: impl Iterator<Item = &'a Entry>, metadata: Option<&str>) -> Vec<u8> {
    let tensor = |Entry { name, kind, shape, bytes, .. }: &Entry| {
        let described = json!({ "dtype": kind, "shape": shape, "data_offsets": [bytes.start, bytes.end] });
        format!("{}:{described}", json!(name))
    };
    let metadata = metadata.map(|text| format!("\"{METADATA}\":{text}"));
    let pairs: Vec<_> = metadata.into_iter().chain(entries.map(tensor)).collect();
    let mut header = format!("{{{}}}", pairs.join(","));
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
}

/// Checks one tensor. Its byte range is relative to the data.
fn entry(name: &str, tensor: &RawValue, data: u64) -> Result<Entry, String> {
    #[derive(serde::Deserialize)]
    struct Described {
        dtype: String,
        shape: Vec<usize>,
        data_offsets: (u64, u64),
    }
    let Described { dtype, shape, data_offsets: (start, end) } =
        serde_json::from_str(tensor.get()).map_err(|error| format!("its description is invalid ({error})"))?;
    let from_name: StrDeserializer<'_, DtypeError> = dtype.as_str().into_deserializer();
    let kind = safetensors::Dtype::deserialize(from_name)
        .map_err(|_| format!("its dtype {dtype:?} is not a dtype of the safetensors format"))?;
    if end < start {
        return Err(format!("its data ends at byte {end}, before it starts at byte {start}"));
    }
    if end > data {
        return Err(format!(
            "its data ends at byte {end}, but the file holds only {data} bytes of data: is it truncated?"
        ));
    }
    let elements = shape.iter().try_fold(1u64, |elements, &n| elements.checked_mul(n as u64));
    let bits = elements.and_then(|elements| elements.checked_mul(kind.bitsize() as u64));
    if bits != Some((end - start) * 8) {
        return Err(format!("its shape {shape:?} of {dtype} does not fit its {} bytes", end - start));
    }
    Ok(Entry { name: name.to_owned(), kind, dtype: clipped_as(kind), shape, bytes: start..end, left_out: false })
}

/// The dtype as which a tensor is clipped, if it can be.
fn clipped_as(kind: safetensors::Dtype) -> Option<Dtype> {
    use safetensors::Dtype as Kind;
    match kind {
        Kind::F32 => Some(Dtype::F32),
        Kind::F64 => Some(Dtype::F64),
        Kind::F16 => Some(Dtype::F16),
        Kind::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

impl Entry {
    /// How many bytes it has.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bytes.end - self.bytes.start
    }

    /// Where its bytes are in a file in memory.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.bytes.start as usize..self.bytes.end as usize
    }

    /// Whether it may be a gradient: all but integers and booleans may.
    #[must_use]
    pub fn may_be_gradient(&self) -> bool {
        use safetensors::Dtype as Kind;
        let integers = [Kind::U8, Kind::I8, Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::U64, Kind::I64];
        self.kind != Kind::BOOL && !integers.contains(&self.kind)
    }

    /// Whether it passes through, although it may be a gradient, because its dtype cannot be clipped.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        // A complex tensor does not pass through: it is an error.
        let complex = self.kind == safetensors::Dtype::C64;
        self.may_be_gradient() && self.dtype.is_none() && !complex && !self.left_out
    }
}

/// Checks that the sorted entries cover the data exactly.
fn cover(entries: &[Entry], data: u64) -> Result<(), String> {
    let mut end = 0;
    let mut before: Option<&Entry> = None;
    for entry in entries {
        let Range { start, end: next } = entry.bytes;
        match before {
            Some(before) if start < end => {
                return Err(format!(
                    "tensors {:?} and {:?} overlap at byte {start} of the data",
                    before.name, entry.name
                ));
            }
            _ if start > end => {
                return Err(format!(
                    "bytes {end}..{start} of the data, before tensor {:?}, belong to no tensor",
                    entry.name
                ));
            }
            _ => {}
        }
        (end, before) = (next, Some(entry));
    }
    if end < data { Err(format!("the last {} bytes of the file belong to no tensor", data - end)) } else { Ok(()) }
}

/// The pairs of a JSON object in order, including those with equal keys.
#[derive(Debug)]
pub struct Pairs<V>(pub Vec<(String, V)>);

/// The first key that occurs twice.
#[must_use]
pub fn duplicate<V>(pairs: &[(String, V)]) -> Option<&str> {
    let mut seen = HashSet::new();
    pairs.iter().map(|(key, _)| key.as_str()).find(|key| !seen.insert(*key))
}

impl<V: Serialize> Serialize for Pairs<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| (key, value)))
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for InOrder<V> {
            type Value = Pairs<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}
