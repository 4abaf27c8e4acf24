//! Every variant of every kernel, validated and translated to what each platform compiles, so that nobody on Metal or DirectX is
//! the first to see it. How long its SPIR-V is stands in `shaders/spirv_words.txt`: a lost simplification shows there without
//! a stopwatch.

use std::collections::BTreeMap;
use std::path::Path;

use naga::back::{glsl, hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{Module, ShaderStage};

use super::kernels::{Access, Constants, Kernel, Norm, SHARED, Shape, module};
use super::profile;
use super::threshold::Formula;
use super::tuning::{HARDWARE_SWEEP, SOFTWARE_SWEEP};
use crate::Dtype;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/spirv_words.txt");

/// Every kernel with every set of constants that a plan may ask for.
fn kernels() -> Vec<Kernel> {
    let mut all = vec![Kernel::Merge];
    let norms = [Norm::L1, Norm::L2, Norm::Inf, Norm::P];
    let either = [false, true];
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for norm in norms {
            all.extend([Kernel::Norm { dtype, norm }, Kernel::NormEach { dtype, norm }]);
        }
        all.extend([Kernel::Scale { dtype }, Kernel::Sum { dtype }]);
        all.extend(either.map(|columns| Kernel::ScaleEach { dtype, columns }));
        for guarded in either {
            all.extend(either.map(|writes| Kernel::Clamp { dtype, guarded, writes }));
        }
    }
    for norm in norms {
        all.extend([Formula::Agc, Formula::ZClip, Formula::AdaGc].map(|formula| Kernel::Threshold { formula, norm }));
    }
    for norm in norms.map(Some).into_iter().chain([None]) {
        all.extend(either.map(|given| Kernel::Finalise { norm, given }));
    }
    for value in either {
        all.extend(either.map(|guarded| Kernel::Edges { value, guarded }));
    }
    all.extend(either.map(|moves| Kernel::Accumulate { moves }));
    all
}

/// Every way in which a kernel may reach gradients.
fn accesses(kernel: Kernel) -> &'static [Access] {
    match kernel {
        Kernel::Merge | Kernel::Threshold { .. } | Kernel::Finalise { .. } | Kernel::Accumulate { .. } => {
            &[Access::None]
        }
        Kernel::Sum { .. } => &[Access::Words],
        _ => &[Access::Words, Access::Quads, Access::Array(64)],
    }
}

/// Shapes of which each choice is in one.
const SHAPES: [Shape; 3] = [
    Shape { workgroup: 8, contiguous: true, subgroups: false },
    Shape { workgroup: 256, contiguous: false, subgroups: true },
    Shape { workgroup: 256, contiguous: false, subgroups: false },
];

/// What is known of a module, by its name in the golden file.
struct Variant {
    name: String,
    source: String,
    arrays: bool,
    subgroups: bool,
}

fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    for kernel in kernels() {
        for access in accesses(kernel) {
            for shape in SHAPES {
                let merging = if shape.subgroups { "subgroups" } else { "tree" };
                all.push(Variant {
                    name: format!("{kernel:?} {access:?} {} {merging}", shape.workgroup),
                    source: kernel.source(*access, shape),
                    arrays: matches!(access, Access::Array(_)),
                    subgroups: shape.subgroups,
                });
            }
        }
    }
    for (name, sweep) in [("software", SOFTWARE_SWEEP), ("hardware", HARDWARE_SWEEP)] {
        for kernel in ["read", "copy"] {
            let (name, source) = (format!("{kernel} {name}"), profile::source(sweep, kernel));
            all.push(Variant { name, source, arrays: false, subgroups: false });
        }
    }
    all
}

/// The module, valid with nothing more than what the device is asked for.
fn validated(variant: &Variant) -> (Module, ModuleInfo) {
    let Variant { name, source, arrays, subgroups } = variant;
    let module =
        naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    let mut capabilities = Capabilities::default();
    let of_arrays =
        Capabilities::STORAGE_BUFFER_BINDING_ARRAY | Capabilities::STORAGE_BUFFER_BINDING_ARRAY_NON_UNIFORM_INDEXING;
    capabilities.set(of_arrays, *arrays);
    capabilities.set(Capabilities::SUBGROUP, *subgroups);
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    (module, info)
}

/// As `kernels::trusted` has modules compiled.
const UNCHECKED: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Unchecked,
    buffer: BoundsCheckPolicy::Unchecked,
    image_load: BoundsCheckPolicy::Unchecked,
    binding_array: BoundsCheckPolicy::Unchecked,
};

/// Words of SPIR-V: Vulkan.
fn spirv(name: &str, module: &Module, info: &ModuleInfo) -> usize {
    let options = spv::Options {
        lang_version: (1, 3),
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        ..Default::default()
    };
    let entry = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: "main".into() };
    spv::write_vec(module, info, &options, Some(&entry)).unwrap_or_else(|e| panic!("{name}, SPIR-V: {e}")).len()
}

/// Metal.
fn metal(name: &str, module: &Module, info: &ModuleInfo) -> String {
    let options = msl::Options {
        lang_version: (2, 4),
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let (text, told) = msl::write_string(module, info, &options, &msl::PipelineOptions::default())
        .unwrap_or_else(|e| panic!("{name}, MSL: {e}"));
    assert!(told.entry_point_names.iter().all(Result::is_ok), "{name}, MSL: {:?}", told.entry_point_names);
    text
}

/// DirectX 12.
fn directx(name: &str, module: &Module, info: &ModuleInfo) -> String {
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        // Where wgpu puts the number of workgroups.
        special_constants_binding: Some(hlsl::BindTarget::default()),
        zero_initialize_workgroup_memory: false,
        restrict_indexing: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let mut text = String::new();
    let told = hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default())
        .write(module, info, None)
        .unwrap_or_else(|e| panic!("{name}, HLSL: {e}"));
    assert!(told.entry_point_names.iter().all(Result::is_ok), "{name}, HLSL: {:?}", told.entry_point_names);
    text
}

/// OpenGL ES 3.1, the least that has compute shaders.
fn opengl(name: &str, module: &Module, info: &ModuleInfo) -> String {
    let options = glsl::Options { zero_initialize_workgroup_memory: false, ..Default::default() };
    let entry =
        glsl::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: "main".into(), multiview: None };
    let mut text = String::new();
    glsl::Writer::new(&mut text, module, info, &options, &entry, BoundsCheckPolicies::default())
        .and_then(|mut writer| writer.write())
        .unwrap_or_else(|e| panic!("{name}, GLSL: {e}"));
    text
}

#[test]
fn every_kernel_translates_to_every_language() {
    let mut words = BTreeMap::new();
    let mut translated = [0; 4];
    for variant in variants() {
        // For `scripts/tint.sh`.
        if let Some(folder) = std::env::var_os("GRADCLIP_WGSL") {
            let file = Path::new(&folder).join(format!("{}.wgsl", variant.name));
            std::fs::write(file, &variant.source).expect("the folder can be written to");
        }
        let (module, info) = validated(&variant);
        let Variant { name, arrays, subgroups, .. } = variant;
        assert!(metal(&name, &module, &info).contains("kernel void"), "{name}");
        translated[1] += 1;
        // wgpu offers arrays of buffers on neither of these, and subgroups not on OpenGL.
        if !arrays {
            assert!(directx(&name, &module, &info).contains("numthreads"), "{name}");
            translated[2] += 1;
        }
        if !arrays && !subgroups {
            assert!(opengl(&name, &module, &info).contains("local_size_x"), "{name}");
            translated[3] += 1;
        }
        let length = spirv(&name, &module, &info);
        translated[0] += 1;
        assert!(words.insert(name.clone(), length).is_none(), "two variants are called {name}");
    }
    let [spirv, msl, hlsl, glsl] = translated;
    println!("kernels translated: {spirv} to SPIR-V, {msl} to MSL, {hlsl} to HLSL, {glsl} to GLSL");

    let table: String = words.iter().map(|(name, words)| format!("{words:6} {name}\n")).collect();
    if std::env::var_os("GRADCLIP_BLESS").is_some() {
        std::fs::write(GOLDEN, &table).expect("the file can be written");
    }
    let golden = std::fs::read_to_string(GOLDEN).expect("the golden file is there");
    for (now, before) in table.lines().zip(golden.lines()) {
        assert_eq!(now, before, "words of SPIR-V, now and in {GOLDEN}; if it is meant: GRADCLIP_BLESS=1 cargo test");
    }
    assert_eq!(table.lines().count(), golden.lines().count(), "variants, now and in {GOLDEN}");
}

/// Behind its own imports alone, a file lacks nothing.
#[test]
fn every_file_imports_what_it_needs() {
    for (name, _) in SHARED {
        let source = module(name, &Constants::default(), Access::Array(64), SHAPES[0]);
        naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    }
}
