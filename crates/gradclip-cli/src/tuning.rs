//! The tunings that `gradclip tune` has found, kept in the user's configuration folder, one for each device.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use etcetera::BaseStrategy;
use gradclip::gpu::tuning::Tuning;
use gradclip::wgpu::AdapterInfo;
use serde::{Deserialize, Serialize};

use crate::devices::driver;
use crate::failure::Failure;
use crate::output;

/// A device, and the tuning that is fastest on it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Row {
    adapter: String,
    backend: String,
    driver: String,
    /// The version of gradclip, because its kernels change.
    version: String,
    tuning: Tuning,
}

/// The tuning kept for a device. A row of another driver or version does not count.
pub(crate) fn kept(info: &AdapterInfo) -> Result<Option<Tuning>, Failure> {
    let Some(path) = path() else { return Ok(None) };
    // The tuning of the row itself plays no part in the comparison.
    Ok(rows(&path)?.into_iter().find(|row| *row == Row::new(info, row.tuning)).map(|row| row.tuning))
}

/// Keeps the tuning of a device in place of the one before, or none. Returns the file, if the row is in one.
pub(crate) fn keep(info: &AdapterInfo, tuning: Option<Tuning>) -> Result<Option<PathBuf>, Failure> {
    let Some(path) = path() else {
        return match tuning {
            Some(_) => Err(Failure::Setup("no home folder to keep the tuning in; set HOME or XDG_CONFIG_HOME".into())),
            None => Ok(None),
        };
    };
    let before = rows(&path)?;
    let mut rows = before.clone();
    let backend = format!("{:?}", info.backend);
    rows.retain(|row| (&row.adapter, &row.backend) != (&info.name, &backend));
    rows.extend(tuning.map(|tuning| Row::new(info, tuning)));
    if rows != before {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Failure::io(folder, "create the folder"))?;
        }
        let text = serde_json::to_string_pretty(&rows).map_err(|error| Failure::file(&path, error.to_string()))?;
        output::write_file(format!("{text}\n").as_bytes(), &path, true)?;
    }
    Ok(tuning.map(|_| path))
}

impl Row {
    fn new(info: &AdapterInfo, tuning: Tuning) -> Self {
        Self {
            adapter: info.name.clone(),
            backend: format!("{:?}", info.backend),
            driver: driver(info),
            version: env!("CARGO_PKG_VERSION").into(),
            tuning,
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
