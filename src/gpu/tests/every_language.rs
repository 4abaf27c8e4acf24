//! Validates every variant of every kernel and translates it to the language of each platform, so that faults on Metal
//! or DirectX show here first. `shaders/spirv_words.txt` holds the size of the SPIR-V of the hot ones: a lost
//! simplification shows there without a stopwatch. `scripts/kernels.sh` gives all of them to other compilers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use naga::back::{glsl, hlsl, msl, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ModuleInfo, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{AddressSpace, ArraySize, Module, ShaderStage, TypeInner};

use super::super::kernels::{Access, Constants, Kernel, Norm, SHARED, Shape, StepKernel, Update, module};
use super::super::profile;
use super::super::threshold::Formula;
use super::super::tuning::{HARDWARE_SWEEP, SOFTWARE_SWEEP};
use crate::{Algorithm, Dtype, Halves, Optimizer};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/spirv_words.txt");

/// If this variable is set, it names the folder that each variant's WGSL and SPIR-V are written to, and the MSL of the hot
/// ones.
const FOLDER: &str = "GRADCLIP_KERNELS";

/// Every kernel with every set of constants that a plan may ask for.
fn kernels() -> Vec<Kernel> {
    let mut all = vec![Kernel::Merge];
    let norms = [Norm::L1, Norm::L2, Norm::Inf, Norm::P];
    let either = [false, true];
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for norm in norms {
            all.extend([Kernel::Norm { dtype, norm }, Kernel::NormEach { dtype, norm }]);
        }
        all.push(Kernel::Sum { dtype });
        for counts in either {
            all.push(Kernel::Scale { dtype, counts });
            all.extend(either.map(|columns| Kernel::ScaleEach { dtype, columns, counts }));
            all.extend(either.map(|guarded| Kernel::Clamp { dtype, guarded, writes: true, counts }));
        }
        all.extend(either.map(|guarded| Kernel::Clamp { dtype, guarded, writes: false, counts: false }));
    }
    for norm in norms {
        all.extend(
            [Formula::Agc, Formula::ZClip, Formula::AdaGc, Formula::Fixed]
                .map(|formula| Kernel::Threshold { formula, norm }),
        );
    }
    for norm in norms.map(Some).into_iter().chain([None]) {
        all.extend(either.map(|given| Kernel::Finalise { norm, given }));
    }
    for value in either {
        all.extend(either.map(|guarded| Kernel::Edges { value, guarded }));
    }
    all.extend(either.map(|moves| Kernel::Accumulate { moves }));
    all.push(Kernel::Numbers);
    all.extend(steps().into_iter().map(Kernel::Step));
    all
}

/// Every update, every pair of dtypes with what may be kept of halves, and every way to clip, each with one of the others:
/// they meet in float32 only.
fn steps() -> Vec<StepKernel> {
    let (f32, adam) = (Dtype::F32, Optimizer::adam(1e-3));
    let of = |optimizer: Optimizer, gradient, parameter| StepKernel {
        gradient,
        parameter,
        update: Update::of(&optimizer, parameter),
        value: false,
        each: false,
    };
    let (sgd, rmsprop) = (Optimizer::sgd(0.1), Optimizer::rmsprop(0.1));
    let updates = [
        sgd,
        sgd.momentum(0.9),
        Optimizer::adagrad(0.1),
        rmsprop,
        rmsprop.momentum(0.9),
        rmsprop.centered(true),
        rmsprop.momentum(0.9).centered(true),
        adam.amsgrad(true),
    ];
    let mut all: Vec<_> = updates.into_iter().map(|optimizer| of(optimizer, f32, f32)).collect();
    for gradient in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for (parameter, halves) in [
            (f32, Halves::Rounded),
            (Dtype::F16, Halves::Rounded),
            (Dtype::F16, Halves::Master),
            (Dtype::BF16, Halves::Rounded),
            (Dtype::BF16, Halves::Remainder),
            (Dtype::BF16, Halves::Master),
        ] {
            all.push(of(adam.halves(halves), gradient, parameter));
        }
    }
    for (value, each) in [(true, false), (false, true), (true, true)] {
        all.push(StepKernel { value, each, ..of(adam, f32, f32) });
    }
    all
}

/// Every way in which a kernel may reach gradients.
fn accesses(kernel: Kernel) -> &'static [Access] {
    match kernel {
        Kernel::Merge
        | Kernel::Threshold { .. }
        | Kernel::Finalise { .. }
        | Kernel::Accumulate { .. }
        | Kernel::Numbers
        | Kernel::Step(_) => &[Access::None],
        Kernel::Sum { .. } => &[Access::Words],
        _ => &[Access::Words, Access::Quads, Access::Array(64)],
    }
}

/// Shapes that together contain each choice.
const SHAPES: [Shape; 3] = [
    Shape { workgroup: 8, contiguous: true, subgroups: None, native_products: true, native_halves: true },
    Shape { workgroup: 256, contiguous: false, subgroups: Some(32), native_products: true, native_halves: true },
    Shape { workgroup: 256, contiguous: false, subgroups: None, native_products: false, native_halves: false },
];

/// Whether a GPU, with subgroups and quads, spends most of a step in it.
fn is_hot(kernel: Kernel, access: Access, shape: Shape) -> bool {
    let clips = match kernel {
        Kernel::Norm { norm, .. } | Kernel::NormEach { norm, .. } => norm == Norm::L2,
        Kernel::Finalise { norm, given } => norm == Some(Norm::L2) && !given,
        Kernel::Clamp { guarded, writes, counts, .. } => !guarded && writes && !counts,
        Kernel::Threshold { formula, norm } => formula == Formula::Agc && norm == Norm::L2,
        Kernel::Scale { counts, .. } | Kernel::ScaleEach { counts, .. } => !counts,
        Kernel::Sum { .. } | Kernel::Merge => true,
        // AdamW with float32 parameters, and with bfloat16 ones that keep remainders.
        Kernel::Step(StepKernel { gradient, parameter, update, value, each }) => {
            let usual = match parameter {
                Dtype::F32 => gradient != Dtype::F16,
                _ => gradient == Dtype::BF16 && update.halves == Halves::Remainder,
            };
            usual && update.algorithm == Algorithm::Adam && !update.third && !value && !each
        }
        _ => false,
    };
    // A sum has words only.
    let quads =
        matches!(access, Access::None | Access::Quads | Access::Array(_)) || matches!(kernel, Kernel::Sum { .. });
    clips && quads && shape.subgroups.is_some()
}

/// A module, with its name in the golden file.
struct Variant {
    name: String,
    source: String,
    arrays: bool,
    subgroups: bool,
    hot: bool,
}

fn variants() -> Vec<Variant> {
    let mut all = Vec::new();
    for kernel in kernels() {
        for access in accesses(kernel) {
            for shape in SHAPES {
                let merging = if shape.subgroups.is_some() { "subgroups" } else { "tree" };
                all.push(Variant {
                    name: format!("{kernel:?} {access:?} {} {merging}", shape.workgroup),
                    source: kernel.source(*access, shape),
                    arrays: matches!(access, Access::Array(_)),
                    subgroups: shape.subgroups.is_some(),
                    hot: is_hot(kernel, *access, shape),
                });
            }
        }
    }
    for (name, sweep) in [("software", SOFTWARE_SWEEP), ("hardware", HARDWARE_SWEEP)] {
        for kernel in ["read", "copy"] {
            let (name, source) = (format!("{kernel} {name}"), profile::source(sweep, kernel));
            all.push(Variant { name, source, arrays: false, subgroups: false, hot: false });
        }
    }
    for native_halves in [false, true] {
        let source = module("probe", &Constants::of(Dtype::F16), Access::None, Shape { native_halves, ..Shape::PLAIN });
        let name = format!("probe {}", if native_halves { "native" } else { "integers" });
        all.push(Variant { name, source, arrays: false, subgroups: false, hot: false });
    }
    all
}

/// The module, valid with no more capabilities than the device is asked for.
fn validated(variant: &Variant) -> (Module, ModuleInfo) {
    let Variant { name, source, arrays, subgroups, .. } = variant;
    let module =
        naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    let mut capabilities = Capabilities::default() | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let of_arrays =
        Capabilities::STORAGE_BUFFER_BINDING_ARRAY | Capabilities::STORAGE_BUFFER_BINDING_ARRAY_NON_UNIFORM_INDEXING;
    capabilities.set(of_arrays, *arrays);
    capabilities.set(Capabilities::SUBGROUP, *subgroups);
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator.subgroup_stages(naga::valid::ShaderStages::COMPUTE).subgroup_operations(SubgroupOperationSet::all());
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(source)));
    (module, info)
}

/// A line for each binding: group, number, kind and count. A first line says whether the variant is hot.
fn bindings(variant: &Variant, module: &Module) -> String {
    let mut lines = if variant.hot { "hot\n".to_owned() } else { String::new() };
    for (_, global) in module.global_variables.iter() {
        let Some(binding) = &global.binding else { continue };
        let kind = if global.space == AddressSpace::Uniform { "uniform" } else { "storage" };
        let count = match module.types[global.ty].inner {
            TypeInner::BindingArray { size: ArraySize::Constant(count), .. } => count.get(),
            _ => 1,
        };
        lines += &format!("{} {} {kind} {count}\n", binding.group, binding.binding);
    }
    lines
}

/// The checks that `kernels::trusted` leaves out.
const UNCHECKED: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Unchecked,
    buffer: BoundsCheckPolicy::Unchecked,
    image_load: BoundsCheckPolicy::Unchecked,
    binding_array: BoundsCheckPolicy::Unchecked,
};

/// Vulkan.
fn spirv(name: &str, module: &Module, info: &ModuleInfo) -> Vec<u32> {
    let options = spv::Options {
        lang_version: (1, 3),
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        ..Default::default()
    };
    let entry = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point: "main".into() };
    spv::write_vec(module, info, &options, Some(&entry)).unwrap_or_else(|e| panic!("{name}, SPIR-V: {e}"))
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

/// OpenGL ES 3.1, the first that has compute shaders.
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
    let folder = std::env::var_os(FOLDER).map(PathBuf::from);
    let mut names = BTreeSet::new();
    let mut words = BTreeMap::new();
    let mut translated = [0; 4];
    for variant in variants() {
        let write = |ending: &str, bytes: &[u8]| {
            if let Some(folder) = &folder {
                let file = folder.join(format!("{}.{ending}", variant.name));
                std::fs::write(file, bytes).expect("the folder can be written to");
            }
        };
        write("wgsl", variant.source.as_bytes());
        let (module, info) = validated(&variant);
        write("bindings", bindings(&variant, &module).as_bytes());
        let Variant { ref name, arrays, subgroups, hot, .. } = variant;
        assert!(names.insert(name.clone()), "two variants are called {name}");
        let metal = metal(name, &module, &info);
        assert!(metal.contains("kernel void"), "{name}");
        if hot {
            write("metal", metal.as_bytes());
        }
        translated[1] += 1;
        // wgpu offers arrays of buffers on neither DirectX nor OpenGL, and no subgroups on OpenGL.
        if !arrays {
            assert!(directx(name, &module, &info).contains("numthreads"), "{name}");
            translated[2] += 1;
        }
        if !arrays && !subgroups {
            assert!(opengl(name, &module, &info).contains("local_size_x"), "{name}");
            translated[3] += 1;
        }
        let spirv = spirv(name, &module, &info);
        translated[0] += 1;
        write("spv", bytemuck::cast_slice(&spirv));
        if hot {
            words.insert(name.clone(), spirv.len());
        }
    }
    let [spirv, msl, hlsl, glsl] = translated;
    println!("kernels translated: {spirv} to SPIR-V, {msl} to MSL, {hlsl} to HLSL, {glsl} to GLSL");

    let table: String = words.iter().map(|(name, words)| format!("{words:6} {name}\n")).collect();
    if std::env::var_os("GRADCLIP_BLESS").is_some() {
        std::fs::write(GOLDEN, &table).expect("the file can be written");
    }
    let golden = std::fs::read_to_string(GOLDEN).expect("the golden file is there");
    let lines = |table: &str| table.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (now, before) = (lines(&table), lines(&golden));
    let gone = before.difference(&now).map(|row| format!("- {row}\n"));
    let come = now.difference(&before).map(|row| format!("+ {row}\n"));
    let differ: String = gone.chain(come).collect();
    assert!(
        differ.is_empty(),
        "words of SPIR-V, in {GOLDEN} (-) and now (+):\n{differ}\
         If that change of a shader was meant: GRADCLIP_BLESS=1 cargo test -p gradclip --lib every_language"
    );
}

/// Each file imports all that it uses.
#[test]
fn every_file_imports_what_it_needs() {
    for (name, _) in SHARED {
        let source = module(name, &Constants::default(), Access::Array(64), SHAPES[0]);
        naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source)));
    }
}
