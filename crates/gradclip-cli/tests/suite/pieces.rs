//! Guards against what goes wrong where a file is cut into pieces: tensors of several pieces, at odd places, in several
//! files, beside the library's clip of the whole.

use crate::common::{Folder, clip, raw};
use gradclip::{Clip, ClipReport, Clipper, Dtype, NonFinite, Scope, TensorMut, UnitAxis};

/// Name, dtype (None for one that is no gradient), shape.
type Described = (&'static str, Option<Dtype>, [usize; 2]);

/// Nothing begins at a multiple of anything, and pieces end within rows.
const SHARDS: [&[Described]; 2] = [
    &[
        ("1", None, [3, 1]),
        ("2", Some(Dtype::F32), [3001, 407]),
        ("3", Some(Dtype::BF16), [1, 1]),
        ("4", None, [1, (1 << 20) + 1]),
        ("5", Some(Dtype::F64), [2, 200_003]),
    ],
    &[("6", Some(Dtype::F16), [800_001, 2]), ("7", Some(Dtype::F32), [0, 3]), ("8", Some(Dtype::F32), [700, 1025])],
];

fn bytes_of((_, dtype, shape): &Described) -> usize {
    shape[0] * shape[1] * dtype.map_or(1, Dtype::size)
}

/// A file of numbers that differ in size from row to row and column to column.
fn shard(tensors: &[Described]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for tensor @ (name, dtype, shape) in tensors {
        let start = data.len();
        for i in 0..shape[0] * shape[1] {
            let x = ((i * 37 % 101) as f32 - 50.0) * (1 + i / shape[1] % 5) as f32 / (1 + i % shape[1] % 7) as f32;
            match dtype {
                None => data.push(i as u8),
                Some(Dtype::F64) => data.extend(f64::from(x).to_le_bytes()),
                Some(Dtype::F32) => data.extend(x.to_le_bytes()),
                // The upper half of a float32, whichever half it is taken for.
                Some(_) => data.extend(&(x / 100.0).to_le_bytes()[2..]),
            }
        }
        let kind = match dtype {
            None => "U8",
            Some(Dtype::F64) => "F64",
            Some(Dtype::F32) => "F32",
            Some(Dtype::F16) => "F16",
            Some(_) => "BF16",
        };
        assert_eq!(data.len() - start, bytes_of(tensor));
        entries.push(format!(
            r#""{name}":{{"dtype":"{kind}","shape":{shape:?},"data_offsets":[{start},{}]}}"#,
            data.len()
        ));
    }
    raw(&format!("{{{}}}", entries.join(",")), &data)
}

/// What the library makes of the gradients in the shards.
fn clip_whole(clip: &Clip, shards: &mut [Vec<u8>; 2]) -> ClipReport {
    let mut tensors = Vec::new();
    for (file, described) in shards.iter_mut().zip(&SHARDS) {
        let data: usize = described.iter().map(bytes_of).sum();
        let header = file.len() - data;
        let mut rest = &mut file[header..];
        for tensor @ (_, dtype, shape) in *described {
            let (own, others) = rest.split_at_mut(bytes_of(tensor));
            if let Some(dtype) = dtype {
                tensors.push(TensorMut::from_bytes(*dtype, own).unwrap().shape(shape).unwrap());
            }
            rest = others;
        }
    }
    Clipper::cpu().apply(clip, &mut tensors).expect("finite")
}

#[test]
fn a_set_is_clipped_as_a_whole() {
    let folder = Folder::new();
    let shards = SHARDS.map(shard);
    let names = ["1.safetensors", "2.safetensors"];
    let mut map = Vec::new();
    for ((name, file), described) in names.iter().zip(&shards).zip(&SHARDS) {
        folder.write(name, file);
        map.extend(described.iter().map(|(tensor, ..)| format!(r#""{tensor}":"{name}""#)));
    }
    let index = "grads.safetensors.index.json";
    let path = folder.write(index, format!(r#"{{"weight_map":{{{}}}}}"#, map.join(",")));

    let norm = |max_norm| Clip::norm(max_norm);
    let (unit, value) = (norm(60.0).scope(Scope::Unit), |bound| Clip::value(bound));
    let cases: [(&[&str], Clip); 8] = [
        (&["--max-norm", "1"], norm(1.0)),
        (&["--max-norm", "1e9"], norm(1e9)),
        (&["--max-norm", "1000", "--scope", "tensor"], norm(1000.0).scope(Scope::Tensor)),
        (&["--max-norm", "60", "--scope", "unit"], unit),
        (&["--max-norm", "60", "--scope", "unit", "--unit-axis", "last"], unit.unit_axis(UnitAxis::Last)),
        (&["--clip-value", "3"], value(3.0)),
        (&["--clip-value", "1e9"], value(1e9)),
        (&["--clip-value", "3", "--non-finite", "skip"], value(3.0).non_finite(NonFinite::Skip)),
    ];
    for (i, (mode, by)) in cases.into_iter().enumerate() {
        let mut want = shards.clone();
        let report = clip_whole(&by, &mut want);
        assert_eq!(report.clipped, want != shards);
        let out = Folder::new();
        let more = ["--json", "--threads", ["1", "3"][i % 2]];
        let object = clip(&path, &out.path(index), &[mode, &more].concat()).succeeded().json();
        assert_eq!(object["clipped"], report.clipped, "{mode:?}");
        // A value clip has no norm.
        let norm = report.total_norm.is_finite().then_some(report.total_norm);
        assert_eq!(object["total_norm"].as_f64(), norm, "{mode:?}");
        for (name, want) in names.iter().zip(&want) {
            // Millions of numbers: not to be printed.
            assert!(out.read(name) == *want, "{mode:?} {name}");
        }
    }
}
