//! Gathers chunks in windows, and windows in batches.

use super::cut::Cut;
use super::limits::Limits;
use super::rows::{Batch, Window, bytes_of_words};

/// Gathers chunks in windows, by address, and windows in batches. Sets the place of each chunk in them.
pub(super) fn gather(cuts: &mut [Cut], limits: Limits) -> Option<Vec<Batch>> {
    let bytes = |cut: &Cut| bytes_of_words(cut.first..cut.end, cut.dtype);
    let mut by_address: Vec<_> = cuts.iter_mut().collect();
    by_address.sort_by_key(|cut| (cut.buffer, bytes(cut).start));
    let mut windows: Vec<(Window, Vec<&mut Cut>)> = Vec::new();
    for cut in by_address {
        let (buffer, bytes) = (cut.buffer, bytes(cut));
        let fits = |(w, _): &&mut (Window, _)| w.buffer == buffer && bytes.end - w.offset <= limits.binding_bytes;
        if let Some((window, cuts)) = windows.last_mut().filter(fits) {
            window.size = window.size.max(bytes.end - window.offset);
            cuts.push(cut);
        } else {
            let window = Window::of(buffer, &bytes, limits.alignment);
            if window.size > limits.binding_bytes {
                return None;
            }
            windows.push((window, vec![cut]));
        }
    }
    let mut batches: Vec<Batch> = Vec::new();
    for (window, cuts) in windows {
        if batches.last().is_none_or(|batch| batch.windows.len() == limits.windows) {
            batches.push(Batch::default());
        }
        let at = batches.len() - 1;
        let batch = batches.last_mut()?;
        for cut in cuts {
            cut.row.first = u32::try_from(cut.first - window.offset / cut.dtype.size() as u64).ok()?;
            cut.row.window = u32::try_from(batch.windows.len()).ok()?;
            cut.batch = at;
        }
        batch.windows.push(window);
    }
    Some(batches)
}
