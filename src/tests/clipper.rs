//! Tests of `src/clipper.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

#[test]
fn progress_adds_up_to_what_was_measured() {
    let mut data = vec![1.0f32; 300_001];
    let mut tiny = [1.0f64; 3];
    let told = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&told);
    let clipper = Clipper::cpu().on_progress(move |bytes| {
        counter.fetch_add(bytes, Ordering::Relaxed);
    });
    for clip in [Clip::norm(1.0), Clip::value(0.5)] {
        told.store(0, Ordering::Relaxed);
        let tensors = &mut [TensorMut::new(&mut data), TensorMut::new(&mut tiny)];
        clipper.apply(&clip, tensors).expect("finite");
        assert_eq!(told.load(Ordering::Relaxed), 4 * 300_001 + 8 * 3);
    }
}
