//! A run on disk: one file, whole or not at all.
//!
//! ```text
//! "EXPLODE1"                              8 bytes
//! lengths of the three parts              3 numbers of 8 bytes
//! state (JSON), model, optimizer          burn's own records for the last two
//! fingerprint of all before               8 bytes
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;

use gradclip_burn::gradclip::ZClip;
use serde::{Deserialize, Serialize};

use super::Result;
use super::data::Random;
use super::settings::{Clipping, Settings};
use super::train::Figures;

const MAGIC: [u8; 8] = *b"EXPLODE1";
/// Of magic and lengths.
const HEAD: usize = 32;

pub(crate) struct Checkpoint {
    pub(crate) state: State,
    pub(crate) model: Vec<u8>,
    pub(crate) optimizer: Vec<u8>,
}

/// What is no tensor.
#[derive(Deserialize, Serialize)]
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) clipping: Clipping,
    pub(crate) random: Random,
    pub(crate) threshold: Option<ZClip>,
    pub(crate) figures: Figures,
}

impl Checkpoint {
    /// Writes beside `path` and renames, so that the last good checkpoint stays until this one is whole.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let state = serde_json::to_vec(&self.state)?;
        let parts = [&state, &self.model, &self.optimizer];
        let mut bytes = MAGIC.to_vec();
        parts.iter().for_each(|part| bytes.extend((part.len() as u64).to_le_bytes()));
        parts.iter().for_each(|part| bytes.extend(*part));
        bytes.extend(fingerprint(&bytes).to_le_bytes());
        let beside = path.with_extension("tmp");
        let written = File::create(&beside).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&beside, path)
        });
        written.map_err(|error| format!("cannot save {}: {error}", path.display()).into())
    }

    /// None if there is no such file.
    pub(crate) fn read(path: &Path, settings: &Settings, clipping: Clipping) -> Result<Option<Self>> {
        let bytes = match fs::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|error| format!("{}: {error}", path.display()))?,
        };
        let checkpoint = Self::parse(&bytes).and_then(|checkpoint| {
            let State { settings: saved, clipping: of, .. } = &checkpoint.state;
            if *of != clipping {
                return Err(format!("is of the run with {}", of.name()));
            }
            settings.difference(saved).map_or(Ok(checkpoint), |words| Err(format!("was made with {words}")))
        });
        checkpoint.map(Some).map_err(|why| format!("cannot resume: {} {why}", path.display()).into())
    }

    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        if !bytes.starts_with(&MAGIC) {
            return Err("is no checkpoint of this program".into());
        }
        let number = |at: usize| bytes.get(at..at + 8).and_then(|n| n.try_into().ok()).map(u64::from_le_bytes);
        let lengths = [8, 16, 24].map(|at| number(at).unwrap_or(u64::MAX));
        let whole = lengths.iter().fold(HEAD as u64 + 8, |sum, length| sum.saturating_add(*length));
        if bytes.len() as u64 != whole {
            return Err(format!("is truncated or damaged: {} bytes where it should have {whole}", bytes.len()));
        }
        let (body, tail) = bytes.split_at(bytes.len() - 8);
        if fingerprint(body).to_le_bytes() != tail {
            return Err("is damaged: its checksum does not match".into());
        }
        let (state, rest) = body[HEAD..].split_at(lengths[0] as usize);
        let (model, optimizer) = rest.split_at(lengths[1] as usize);
        let state = serde_json::from_slice(state).map_err(|error| format!("is of another version: {error}"))?;
        Ok(Self { state, model: model.to_vec(), optimizer: optimizer.to_vec() })
    }
}

fn fingerprint(bytes: &[u8]) -> u64 {
    let mut fingerprint = Fingerprint::new();
    fingerprint.add(bytes);
    fingerprint.0
}

/// FNV-1a, 64 bits: finds damage, guards against nobody.
pub(crate) struct Fingerprint(pub(crate) u64);

impl Fingerprint {
    pub(crate) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    }
}
