//! A file that was dropped on the page: read slice by slice, and never sent anywhere.

use std::ops::Range;

use gradclip_common::header;
use js_sys::{Function, Promise, Uint8Array};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

use crate::norms::FileNorms;
use crate::page::{Progress, json, sentence};
use crate::timer::now;

/// The norms of a safetensors file, as JSON.
///
/// # Errors
/// An `Error` of JavaScript that says what is wrong with the file.
#[wasm_bindgen]
pub async fn norms(file: web_sys::File, progress: Function) -> Result<String, JsValue> {
    let (size, begin) = (file.size() as u64, now());
    let start = bytes(slice(&file, 0..size.min(8))?).await?;
    let length = header::length(&start, size).map_err(|why| sentence(&why))?;
    let text = bytes(slice(&file, 8..8 + length)?).await?;
    let (entries, _) = header::entries(&text, size).map_err(|why| sentence(&why))?;
    drop(text);
    let mut norms = FileNorms::new(entries).map_err(|why| sentence(&why))?;
    let reads = norms.reads();
    let all: u64 = reads.iter().map(|read| read.bytes.end - read.bytes.start).sum();
    let mut done = 0;
    // The next slice is read while this one is measured.
    let mut next = reads.first().map(|read| slice(&file, read.bytes.clone())).transpose()?;
    for (i, read) in reads.iter().enumerate() {
        let Some(own) = next.take() else { break };
        let own = bytes(own).await?;
        next = reads.get(i + 1).map(|read| slice(&file, read.bytes.clone())).transpose()?;
        norms.add(read, &own).map_err(|why| sentence(&why))?;
        done += own.len() as u64;
        Progress(&progress).tell(done as f64, all as f64, "").await?;
    }
    let report = norms.report(&file.name(), all, (now() - begin) / 1e3).map_err(|why| sentence(&why))?;
    json(&report)
}

/// Begins to read a part of the file.
fn slice(file: &web_sys::File, part: Range<u64>) -> Result<Promise, JsValue> {
    // Sizes of files are exact in a float64.
    let part = file.slice_with_f64_and_f64(part.start as f64, part.end as f64)?;
    Ok(part.array_buffer().unchecked_into())
}

/// What was read.
async fn bytes(reading: Promise) -> Result<Vec<u8>, JsValue> {
    let buffer = JsFuture::from(reading).await.map_err(|error| {
        let why = js_sys::Error::from(error).message();
        sentence(&format!("the browser cannot read the file ({}): was it changed or moved?", String::from(why)))
    })?;
    Ok(Uint8Array::new(&buffer).to_vec())
}
