//! Scopes, modes and norm types: as the peers answered on real gradients, and bit for bit what the library does.

use crate::common::{Folder, Run, f32_tensors, fixture, gradclip};
use gradclip::{Budget, Clip, Clipper, NonFinite, NormType, Scope, Tensor, TensorMut, UnitAxis};
use serde_json::{Value, json};

const BACKENDS: &[&str] = if cfg!(feature = "gpu") { &["cpu", "gpu"] } else { &["cpu"] };

/// Clips a fixture into `out`; the words of the options are separated by spaces.
fn clip(folder: &Folder, input: &str, backend: &str, options: &str) -> Run {
    let (input, out) = (fixture(&format!("inputs/{input}.safetensors")), folder.path("out"));
    let params = options.split_once("--params ").map(|(_, name)| fixture(&format!("inputs/{name}.safetensors")));
    let options = options.split(' ').map(str::to_owned);
    let mut words: Vec<_> = options.take_while(|word| word != "--params").collect();
    words.extend(params.iter().flat_map(|path| ["--params".into(), path.to_str().unwrap().into()]));
    let args =
        ["clip", input.to_str().unwrap(), "-o", out.to_str().unwrap(), "--force", "--json", "--backend", backend];
    gradclip(args.into_iter().map(str::to_owned).chain(words)).succeeded()
}

#[test]
fn options_give_what_the_peers_give() {
    let folder = Folder::new();
    let agc = |name: &str| format!("--params {name}_params");
    let cases = [
        ("timm_agc_convnet_f32", "convnet_f32", "--agc 0.02 ".to_owned() + &agc("convnet_f32")),
        (
            "timm_agc_transformer_f32",
            "transformer_f32",
            "--agc 0.02 --unit-axis first ".to_owned() + &agc("transformer_f32"),
        ),
        (
            "optax_agc_transformer_2d_f32",
            "transformer_f32",
            "--agc 0.03 --agc-eps 0.001 --unit-axis last ".to_owned() + &agc("transformer_f32"),
        ),
        ("optax_block_rms_lstm_f32", "lstm_f32", "--max-rms 0.002 --scope tensor".into()),
        ("optax_block_rms_convnet_f32", "convnet_f32", "--max-rms 0.004 --scope tensor".into()),
        ("tf_average_norm_lstm_f32", "lstm_f32", "--max-average-norm 0.0002 --scope tensor".into()),
        ("tf_average_norm_convnet_f32", "convnet_f32", "--max-average-norm 0.0002 --scope tensor".into()),
        ("tf_norm_per_tensor_lstm_f32", "lstm_f32", "--max-norm 0.05 --eps 0 --scope tensor".into()),
        ("tf_norm_axes0", "convnet_2d_f32", "--max-norm 0.01 --eps 0 --scope unit --unit-axis last".into()),
        ("tf_norm_axes1", "convnet_2d_f32", "--max-norm 0.01 --eps 0 --scope unit --unit-axis first".into()),
        ("torch_norm3_lstm_f32", "lstm_f32", "--max-norm 0.15781 --norm-type 3".into()),
        // Its answer to p = 0.5, since half of the norm remains in each.
        ("torch_norm1_lstm_f32", "lstm_f32", "--max-norm 403543.67 --norm-type 0.5".into()),
    ];
    for (expected, input, options) in &cases {
        let expected = f32_tensors(&fixture(&format!("expected/{expected}.safetensors")));
        for backend in BACKENDS {
            clip(&folder, input, backend, options);
            let clipped = f32_tensors(&folder.path("out"));
            assert_eq!(clipped.len(), expected.len());
            for (name, (shape, values)) in &expected {
                assert_eq!(shape, &clipped[name].0, "{options}: {name}");
                for (x, peers) in clipped[name].1.iter().zip(values) {
                    // The peers' norms are summed in float32.
                    assert!((x - peers).abs() <= 4e-6 * peers.abs(), "{options}: {name} has {x:e}, the peer {peers:e}");
                }
            }
        }
    }
}

#[test]
fn sums_of_examples_are_the_peers() {
    let folder = Folder::new();
    let cases = [
        ("optax_per_example_global", "example", json!(12)),
        ("optax_per_example_layer_uniform", "example-tensor --budget uniform", json!([0, 24, 0, 0])),
        ("optax_per_example_layer_sized", "example-tensor --budget sized", json!([24, 6, 24, 7])),
    ];
    for (expected, scope, num_clipped) in cases {
        let expected = f32_tensors(&fixture(&format!("expected/{expected}.safetensors")));
        for backend in BACKENDS {
            let options = format!("--max-norm 2.4454240798950195 --eps 0 --sum --scope {scope}");
            let object = clip(&folder, "per_example_f32", backend, &options).json();
            assert_eq!(object["num_clipped"], num_clipped, "{scope}");
            let sums = f32_tensors(&folder.path("out"));
            assert_eq!(sums.len(), expected.len());
            for (name, (shape, values)) in &expected {
                assert_eq!(shape, &sums[name].0);
                let largest = values.iter().fold(0f32, |max, x| max.max(x.abs()));
                let near = |(x, peers): (&f32, &f32)| (x - peers).abs() <= 1e-6 * largest;
                assert!(sums[name].1.iter().zip(values).all(near), "{scope}: {name}");
            }
        }
    }
}

/// What the library does with the same file.
fn by_library(input: &str, params: Option<&str>, clip: &Clip) -> (Value, Vec<u8>) {
    let bytes = |name: &str| std::fs::read(fixture(&format!("inputs/{name}.safetensors"))).unwrap();
    let (mut file, params) = (bytes(input), params.map(bytes));
    let header = safetensors::SafeTensors::read_metadata(&file).unwrap();
    let params = params.as_ref().map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
    let infos: Vec<_> =
        header.1.offset_keys().into_iter().map(|name| (header.1.info(&name).unwrap().clone(), name)).collect();
    let parameters: Vec<_> = params
        .iter()
        .flat_map(|file| {
            infos.iter().map(|(info, name)| {
                let data = file.tensor(name).unwrap().data();
                Tensor::from_bytes(gradclip::Dtype::F32, data).unwrap().named(name).shape(&info.shape).unwrap()
            })
        })
        .collect();
    let mut data = &mut file[header.0 + 8..];
    let mut tensors = Vec::new();
    for (i, (info, name)) in infos.iter().enumerate() {
        let (own, rest) = data.split_at_mut(info.data_offsets.1 - info.data_offsets.0);
        let tensor = TensorMut::from_bytes(gradclip::Dtype::F32, own).unwrap().named(name).shape(&info.shape).unwrap();
        tensors.push(match parameters.get(i) {
            Some(parameter) => tensor.parameter(parameter),
            None => tensor,
        });
        data = rest;
    }
    let report = Clipper::cpu().apply(clip, &mut tensors).unwrap();
    let segments: Vec<_> = report.segments.iter().map(|s| json!([s.norm, s.clip_coef])).collect();
    let written = json!([report.total_norm, report.clip_coef, report.clipped, segments]);
    // Read as the program's answer is: not every last bit survives that.
    (serde_json::from_str(&written.to_string()).unwrap(), file)
}

#[test]
fn options_reach_the_library() -> Result<(), gradclip::Error> {
    let norm = Clip::norm(0.01);
    let agc = Clip::agc(0.1);
    let cases = [
        ("--max-norm 0.01 --norm-type 2.5", norm.norm_type(NormType::p(2.5))),
        ("--max-norm 0.01 --norm-type 1 --scope tensor", norm.norm_type(NormType::L1).scope(Scope::Tensor)),
        ("--max-norm 0.01 --scope unit", norm.scope(Scope::Unit)),
        ("--max-norm 0.01 --scope unit --unit-axis first", norm.scope(Scope::Unit).unit_axis(UnitAxis::First)),
        (
            "--max-norm 0.01 --scope unit --unit-axis last --eps 0.5",
            norm.scope(Scope::Unit).unit_axis(UnitAxis::Last).eps(0.5),
        ),
        ("--max-norm 0.01 --scope example --grad-scale 3", norm.scope(Scope::Example).grad_scale(3.0)),
        ("--max-norm 0.01 --scope example-tensor", norm.scope(Scope::ExampleTensor)),
        ("--max-norm 0.01 --scope example-tensor --budget each", norm.scope(Scope::ExampleTensor)),
        (
            "--max-norm 0.01 --scope example-tensor --budget uniform",
            norm.scope(Scope::ExampleTensor).budget(Budget::Uniform),
        ),
        (
            "--max-norm 0.01 --scope example-tensor --budget sized",
            norm.scope(Scope::ExampleTensor).budget(Budget::Sized),
        ),
        ("--max-rms 0.01", Clip::rms(0.01)),
        (
            "--max-rms 0.01 --scope example --non-finite drop",
            Clip::rms(0.01).scope(Scope::Example).non_finite(NonFinite::Drop),
        ),
        ("--max-average-norm 0.0001 --scope global", Clip::average_norm(0.0001)),
        ("--agc 0.1 --params per_example_f32", agc),
        ("--agc 0.1 --scope global --params per_example_f32", agc.scope(Scope::Global)),
        ("--agc 0.1 --scope tensor --agc-eps 20 --params per_example_f32", agc.scope(Scope::Tensor).agc_eps(20.0)),
        ("--agc 0.1 --unit-axis last --params per_example_f32", agc.unit_axis(UnitAxis::Last)),
        ("--agc 0.1 --unit-axis optax --params per_example_f32", agc.unit_axis(UnitAxis::Optax)),
        ("--agc 0.1 --unit-axis 0,-1 --params per_example_f32", agc.unit_axis(UnitAxis::axes(&[0, -1]))),
        ("--agc 0.1 --unit-axis=over:-1 --params per_example_f32", agc.unit_axis(UnitAxis::over(&[-1]))),
        ("--agc 0.1 --norm-type 1 --params per_example_f32", agc.norm_type(NormType::L1)),
    ];
    let folder = Folder::new();
    for (options, description) in cases {
        let params = options.contains("--params").then_some("per_example_f32");
        let (report, bytes) = by_library("per_example_f32", params, &description);
        let object = clip(&folder, "per_example_f32", "cpu", options).json();
        let segments = object["segments"].as_array().into_iter().flatten();
        let segments: Vec<_> = segments.map(|s| json!([s["norm"], s["clip_coef"]])).collect();
        let written = json!([object["total_norm"], object["clip_coef"], object["clipped"], segments]);
        assert_eq!((&written, object["clipped"] == true), (&report, true), "{options}");
        assert!(folder.read("out") == bytes, "{options}");
    }
    Ok(())
}
