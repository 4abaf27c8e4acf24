//! What `gradclip tune` has found, kept in the user's configuration folder, a row for each device; and beside it the
//! pipelines that a driver has compiled.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use etcetera::BaseStrategy;
use gradclip::gpu::GpuClipper;
use gradclip::gpu::tuning::Tuning;
use gradclip::wgpu::{self, AdapterInfo};
use serde::{Deserialize, Serialize};

use crate::devices::driver;
use crate::failure::Failure;
use crate::output;

/// What was found for a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Found {
    /// The tuning that is fastest, if it is not the built-in one.
    pub(crate) tuning: Option<Tuning>,
    /// From how many bytes on it is faster than the CPU for tensors in host memory; [`NEVER`] if it was at no size.
    pub(crate) host_from: Option<u64>,
}

/// More bytes than any set has.
pub(crate) const NEVER: u64 = u64::MAX;

/// A device, and what was found for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Row {
    adapter: String,
    backend: String,
    driver: String,
    /// The version of gradclip, because its kernels change.
    version: String,
    #[serde(flatten)]
    found: Found,
}

/// What is kept for a device. A row of another driver or version does not count.
pub(crate) fn kept(info: &AdapterInfo) -> Result<Found, Failure> {
    let Some(path) = path() else { return Ok(Found::default()) };
    // What the row holds plays no part in the comparison.
    let fits = |row: &Row| *row == Row::new(info, row.found);
    Ok(rows(&path)?.into_iter().find(fits).map(|row| row.found).unwrap_or_default())
}

/// Changes what is kept for a device. Returns the file, if anything is kept.
pub(crate) fn keep(info: &AdapterInfo, change: impl FnOnce(&mut Found)) -> Result<Option<PathBuf>, Failure> {
    let mut found = kept(info)?;
    change(&mut found);
    let something = found != Found::default();
    let Some(path) = path() else {
        return if something {
            Err(Failure::Setup("no home folder to keep the tuning in; set HOME or XDG_CONFIG_HOME".into()))
        } else {
            Ok(None)
        };
    };
    let before = rows(&path)?;
    let mut rows = before.clone();
    let backend = format!("{:?}", info.backend);
    rows.retain(|row| (&row.adapter, &row.backend) != (&info.name, &backend));
    rows.extend(something.then(|| Row::new(info, found)));
    if rows != before {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Failure::io(folder, "create the folder"))?;
        }
        let text = serde_json::to_string_pretty(&rows).map_err(|error| Failure::file(&path, error.to_string()))?;
        output::write_file(format!("{text}\n").as_bytes(), &path, true)?;
    }
    Ok(something.then_some(path))
}

/// The GPU with the pipelines that an earlier run has compiled on it.
#[allow(unsafe_code)]
pub(crate) fn with_pipelines(gpu: &GpuClipper) -> GpuClipper {
    let bytes = pipelines(gpu).and_then(|path| fs::read(path).ok()).unwrap_or_default();
    // SAFETY: only `keep_pipelines` writes the file, in a folder that belongs to the user, who could change the program too.
    let caching = unsafe { gpu.with_pipeline_cache(&bytes) };
    // Without one only time is lost.
    caching.unwrap_or_else(|_| gpu.clone())
}

/// Keeps what the driver has compiled for the next run. If that fails, the next run only takes longer.
pub(crate) fn keep_pipelines(gpu: &GpuClipper) {
    let (Some(path), Some(bytes)) = (pipelines(gpu), gpu.pipeline_cache()) else { return };
    if fs::read(&path).is_ok_and(|before| before == bytes) {
        return;
    }
    if path.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok()) {
        let _ = output::write_file(&bytes, &path, true);
    }
}

/// The file of a device's pipelines. None if its driver keeps none.
fn pipelines(gpu: &GpuClipper) -> Option<PathBuf> {
    let name = wgpu::util::pipeline_cache_key(&gpu.device().adapter_info())?;
    Some(path()?.with_file_name(name))
}

impl Row {
    fn new(info: &AdapterInfo, found: Found) -> Self {
        Self {
            adapter: info.name.clone(),
            backend: format!("{:?}", info.backend),
            driver: driver(info),
            version: env!("CARGO_PKG_VERSION").into(),
            found,
        }
    }
}

/// None without a home folder.
fn path() -> Option<PathBuf> {
    Some(etcetera::choose_base_strategy().ok()?.config_dir().join("gradclip").join("tuning.json"))
}

fn rows(path: &PathBuf) -> Result<Vec<Row>, Failure> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(Failure::io(path, "read"))?,
    };
    serde_json::from_str(&text).map_err(|error| {
        let advice = "remove the file and run `gradclip tune` again, or use --no-tuning";
        Failure::file(path, format!("is no list of tunings ({error}); {advice}"))
    })
}
