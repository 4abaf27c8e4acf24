//! GPUs, each opened once.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use gradclip::Error;
use gradclip::gpu::GpuClipper;

/// The GPU whose name holds this text, or the best one.
pub(crate) fn gpu(name: Option<&str>) -> Result<GpuClipper, Error> {
    static OPEN: Mutex<Option<HashMap<Option<String>, GpuClipper>>> = Mutex::new(None);
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let open = open.get_or_insert_default();
    let key = name.map(str::to_owned);
    if let Some(gpu) = open.get(&key) {
        return Ok(gpu.clone());
    }
    let gpu = match name {
        Some(name) => GpuClipper::open_named(name).wait()?,
        None => GpuClipper::open().wait()?,
    };
    open.insert(key, gpu.clone());
    Ok(gpu)
}
