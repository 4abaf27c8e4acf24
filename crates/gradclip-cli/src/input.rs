//! Gradients in files: a safetensors file, or a sharded set through its index. They are mapped, so that files larger than
//! memory work.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use gradclip::Tensor;
use gradclip_common::header::{self, Entry, MAX_HEADER, Pairs};
use gradclip_common::text::plural;

use crate::failure::Failure;
use crate::mapped::Mapped;

/// What can be clipped.
const SUPPORTED: &str = "float32, float64, float16 and bfloat16";

/// The end of the name of an index.
pub(crate) const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// True for the name of an index.
pub(crate) fn is_index(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(INDEX_SUFFIX))
}

/// The files of one FILE argument, with all headers checked.
#[derive(Debug)]
pub(crate) struct Input {
    /// The argument.
    pub(crate) path: PathBuf,
    /// The text of the index of a sharded set.
    pub(crate) index: Option<Vec<u8>>,
    /// The one file, or the shards in the order of their names.
    pub(crate) files: Vec<InputFile>,
}

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct InputFile {
    pub(crate) path: PathBuf,
    pub(crate) entries: Vec<Entry>,
    /// The text of the header's metadata.
    pub(crate) metadata: Option<String>,
    map: Mapped,
}

impl Input {
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let (index, files) = if is_index(path) {
            let (text, files) = open_set(path)?;
            (Some(text), files)
        } else {
            (None, vec![InputFile::open(path)?])
        };
        Ok(Self { path: path.to_owned(), index, files })
    }

    /// The gradients, in the order of the files and of their data. A complex tensor is an error, because the norm would
    /// miss it.
    pub(crate) fn tensors(&self) -> Result<Vec<Tensor<'_>>, Failure> {
        let mut tensors = Vec::new();
        for (file, entry) in self.files.iter().flat_map(|file| file.entries.iter().map(move |entry| (file, entry))) {
            if entry.kind == safetensors::Dtype::C64 && !entry.left_out {
                let advice =
                    "save its real and imaginary parts as float32 (torch.view_as_real), which have the same L2 norm";
                let problem = format!("tensor {:?} is complex and cannot be clipped: {advice}", entry.name);
                return Err(Failure::file(&file.path, problem));
            }
            tensors.extend(file.tensor(entry)?);
        }
        Ok(tensors)
    }

    /// The parameters of the gradients, in the same order: the tensors of the same names in `params`.
    pub(crate) fn parameters<'p>(&self, params: Option<&'p Self>) -> Result<Vec<Tensor<'p>>, Failure> {
        let Some(params) = params else { return Ok(Vec::new()) };
        let entries = |file: &'p InputFile| file.entries.iter().map(move |entry| (entry.name.as_str(), (file, entry)));
        let found: HashMap<_, _> = params.files.iter().flat_map(entries).collect();
        let of = |gradient: &Entry| {
            let bad = |problem| Failure::file(&params.path, format!("tensor {:?} {problem}", gradient.name));
            let Some((file, entry)) = found.get(gradient.name.as_str()) else {
                return Err(bad("is missing, but --agc needs the parameter of each gradient".into()));
            };
            if entry.shape != gradient.shape {
                return Err(bad(format!("has the shape {:?}, but its gradient {:?}", entry.shape, gradient.shape)));
            }
            file.tensor(entry)?
                .ok_or_else(|| bad(format!("is {}, but --agc needs parameters of {SUPPORTED}", entry.kind)))
        };
        self.gradients().map(of).collect()
    }

    /// The header entries of the gradients, in the same order.
    pub(crate) fn gradients(&self) -> impl Iterator<Item = &Entry> {
        self.files.iter().flat_map(|file| &file.entries).filter(|entry| entry.dtype.is_some())
    }

    /// Lets tensors pass through whose names are not to be taken, if they may be gradients.
    pub(crate) fn retain(&mut self, takes: impl Fn(&str) -> bool) {
        for entry in self.files.iter_mut().flat_map(|file| &mut file.entries) {
            if entry.may_be_gradient() && !takes(&entry.name) {
                (entry.dtype, entry.left_out) = (None, true);
            }
        }
    }

    /// How many tensors pass through because others were selected.
    pub(crate) fn left_out(&self) -> usize {
        self.files.iter().flat_map(|file| &file.entries).filter(|entry| entry.left_out).count()
    }

    /// The size of all files together.
    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes().len() as u64).sum()
    }

    /// The tensors that may be gradients but cannot be clipped: name and dtype.
    pub(crate) fn unsupported(&self) -> impl Iterator<Item = (String, String)> {
        let entries = self.files.iter().flat_map(|file| &file.entries).filter(|entry| entry.is_unsupported());
        entries.map(|entry| (entry.name.clone(), entry.kind.to_string()))
    }

    /// The number of tensors that are no gradients, or cannot be clipped.
    pub(crate) fn others(&self) -> usize {
        let entries = self.files.iter().flat_map(|file| &file.entries);
        entries.filter(|entry| entry.dtype.is_none() && !entry.left_out).count()
    }
}

impl InputFile {
    fn open(path: &Path) -> Result<Self, Failure> {
        let file = open_regular(path)?;
        let map = Mapped::open(path, file)?;
        let (entries, metadata) = header::parse(&map).map_err(|problem| match map.unchanged() {
            Ok(()) => Failure::file(path, problem),
            Err(changed) => changed,
        })?;
        Ok(Self { path: path.to_owned(), entries, metadata, map })
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// One tensor; `None` if it is no gradient.
    fn tensor<'a>(&'a self, entry: &'a Entry) -> Result<Option<Tensor<'a>>, gradclip::Error> {
        let of = |dtype| {
            let tensor = Tensor::from_bytes(dtype, &self.map[entry.range()])?;
            tensor.named(&entry.name).shape(&entry.shape)
        };
        entry.dtype.map(of).transpose()
    }
}

/// A warning about tensors (name and dtype) that may be gradients; `done` is what is not done to them.
pub(crate) fn unsupported_warning(mut tensors: impl Iterator<Item = (String, String)>, done: &str) -> Option<String> {
    let (name, dtype) = tensors.next()?;
    let count = plural(1 + tensors.count() as u64, "tensor");
    Some(format!("warning: {count} not {done}, the first {name:?} ({dtype}): only {SUPPORTED} can be"))
}

/// Fails if a file has changed since it was opened: what was read is then invalid.
pub(crate) fn unchanged<'a>(inputs: impl IntoIterator<Item = &'a Input>) -> Result<(), Failure> {
    inputs.into_iter().flat_map(|input| &input.files).try_for_each(|file| file.map.unchanged())
}

/// For `map_err`: if an input has changed, that explains any failure of what reads it.
pub(crate) fn explain<'a>(inputs: impl IntoIterator<Item = &'a Input>) -> impl FnOnce(Failure) -> Failure {
    move |failure| unchanged(inputs).err().unwrap_or(failure)
}

/// Opens a regular file. Anything else could block for ever (a pipe), or could not be mapped.
pub(crate) fn open_regular(path: &Path) -> Result<File, Failure> {
    if !fs::metadata(path).map_err(Failure::io(path, "open"))?.is_file() {
        return Err(Failure::file(path, "not a regular file: name a safetensors file or an index"));
    }
    File::open(path).map_err(Failure::io(path, "open"))
}

/// Opens every shard that an index lists, and checks the index and the shards against each other.
fn open_set(index: &Path) -> Result<(Vec<u8>, Vec<InputFile>), Failure> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Pairs<String>,
    }
    let bad = |problem: String| Failure::file(index, problem);
    if open_regular(index)?.metadata().map_err(Failure::io(index, "read"))?.len() > MAX_HEADER {
        return Err(bad(format!("the index is longer than {MAX_HEADER} bytes: is it an index?")));
    }
    let text = fs::read(index).map_err(Failure::io(index, "read"))?;
    let Index { weight_map: Pairs(weight_map) } = serde_json::from_slice(&text).map_err(|error| {
        bad(format!("not an index of a sharded set, which names a shard for each tensor ({error})"))
    })?;
    if let Some(name) = header::duplicate(&weight_map) {
        return Err(bad(format!("the index lists tensor {name:?} twice: each belongs to one shard")));
    }
    // Each with one of its tensors, for messages.
    let shards: BTreeMap<_, _> = weight_map.iter().map(|(tensor, shard)| (shard.as_str(), tensor)).collect();
    let files = shards
        .iter()
        .map(|(shard, tensor)| InputFile::open(&shard_path(index, shard, tensor)?))
        .collect::<Result<Vec<_>, _>>()?;

    let listed: HashMap<_, _> = weight_map.iter().map(|(tensor, shard)| (tensor.as_str(), shard.as_str())).collect();
    let mut held = HashSet::new();
    for (file, shard) in files.iter().zip(shards.keys()) {
        for Entry { name, .. } in &file.entries {
            match listed.get(name.as_str()) {
                Some(place) if place == shard => held.insert(name),
                Some(place) => {
                    return Err(bad(format!("the index puts tensor {name:?} into {place:?}, but {shard:?} holds it")));
                }
                None => return Err(bad(format!("tensor {name:?} of shard {shard:?} is missing from the index"))),
            };
        }
    }
    if let Some((tensor, shard)) = weight_map.iter().find(|(tensor, _)| !held.contains(tensor)) {
        return Err(bad(format!("the index puts tensor {tensor:?} into {shard:?}, which does not hold it")));
    }
    Ok((text, files))
}

/// The path of a shard. It must be in the folder of the index, not even behind a link, because an index from an untrusted
/// source must not choose which files are read. In a Hugging Face cache, where every file is a link, it must be in the folder of
/// the index's repository.
fn shard_path(index: &Path, shard: &str, tensor: &str) -> Result<PathBuf, Failure> {
    let bad = |problem: &str| Failure::file(index, format!("shard {shard:?} of tensor {tensor:?} {problem}"));
    let mut components = Path::new(shard).components();
    let (first, second) = (components.next(), components.next());
    // Compared with the text as well, because a path forgets a trailing slash.
    let plain = first == Some(Component::Normal(OsStr::new(shard))) && second.is_none();
    if !plain {
        return Err(bad("must be the name of a file in the index's folder"));
    }
    let path = index.with_file_name(shard);
    let folder = folder_of(index);
    let folder = folder.canonicalize().map_err(Failure::io(folder, "open"))?;
    match path.canonicalize() {
        Ok(real) if real.parent() == Some(&folder) => Ok(path),
        Ok(real) if cached_repository(&folder).is_some_and(|repository| real.starts_with(repository)) => Ok(path),
        Ok(_) => Err(bad(
            "is a link that leaves the index's folder (in a Hugging Face cache: the folder of its repository): \
             put the file itself there, as cp -L does",
        )),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(bad("is missing: put it beside the index")),
        // The name is untrusted, and must not reach a terminal as it is.
        Err(error) => Err(bad(&format!("cannot be opened: {error}"))),
    }
}

/// The folder of the repository, if this folder is in a snapshot of a Hugging Face cache:
/// `models--ORG--NAME/snapshots/REVISION`. The files there are links into `models--ORG--NAME/blobs`.
fn cached_repository(folder: &Path) -> Option<&Path> {
    folder.ancestors().find(|above| {
        let name = above.file_name().unwrap_or_default().to_string_lossy();
        let is_repository = ["models--", "datasets--", "spaces--"].iter().any(|kind| name.starts_with(kind));
        is_repository && folder.starts_with(above.join("snapshots"))
    })
}

/// The folder of a file.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
