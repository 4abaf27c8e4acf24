//! `gradclip devices`: lists the devices that the GPU backend finds.

use std::collections::BTreeMap;

use gradclip::gpu::GpuClipper;
use gradclip::wgpu::{Adapter, AdapterInfo, DeviceType, Features};
use gradclip_common::text::{plural, table};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::backend::first_plan;
use crate::failure::Failure;
use crate::print::{print, print_json};

/// The features that kernels or measurements can use.
const FEATURES: [(&str, Features); 3] = [
    ("TIMESTAMP_QUERY", Features::TIMESTAMP_QUERY),
    ("SUBGROUP", Features::SUBGROUP),
    ("SHADER_F16", Features::SHADER_F16),
];

#[derive(Serialize)]
struct Device {
    name: String,
    backend: String,
    device_type: String,
    software: bool,
    driver: String,
    max_storage_buffer_binding_size: u64,
    max_buffer_size: u64,
    subgroup_min_size: u32,
    subgroup_max_size: u32,
    features: Vec<&'static str>,
    /// Only if asked for, because it opens the device.
    first_plan_seconds: Option<f64>,
}

pub(crate) fn run(args: &DevicesArgs) -> Result<(), Failure> {
    let found = gradclip::gpu::adapters().wait();
    let mut adapters: Vec<_> = found.iter().map(Device::of).collect();
    if args.json {
        for (device, adapter) in adapters.iter_mut().zip(&found) {
            // A device that cannot clip is listed all the same.
            let gpu = GpuClipper::open_on(adapter).wait().ok();
            device.first_plan_seconds = gpu.and_then(|gpu| first_plan(&gpu).ok()).map(|time| time.as_secs_f64());
        }
        return print_json(&BTreeMap::from([("adapters", adapters)]));
    }
    if adapters.is_empty() {
        return print("no device found; install a Vulkan driver (Debian: mesa-vulkan-drivers), or use --backend cpu\n");
    }
    print(&adapters.iter().map(Device::text).collect::<Vec<_>>().join("\n"))
}

/// The name and the version of a driver.
pub(crate) fn driver(info: &AdapterInfo) -> String {
    format!("{} {}", info.driver, info.driver_info).trim().to_owned()
}

impl Device {
    fn of(adapter: &Adapter) -> Self {
        let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
        Self {
            driver: driver(&info),
            name: info.name,
            backend: format!("{:?}", info.backend),
            device_type: format!("{:?}", info.device_type),
            software: info.device_type == DeviceType::Cpu,
            max_storage_buffer_binding_size: limits.max_storage_buffer_binding_size,
            max_buffer_size: limits.max_buffer_size,
            subgroup_min_size: info.subgroup_min_size,
            subgroup_max_size: info.subgroup_max_size,
            first_plan_seconds: None,
            features: FEATURES.iter().filter(|(_, f)| features.contains(*f)).map(|(name, _)| *name).collect(),
        }
    }

    fn text(&self) -> String {
        let kind = if self.software { "software: runs on the CPU" } else { &self.device_type };
        let features = if self.features.is_empty() { "none of interest".into() } else { self.features.join(", ") };
        let subgroups = match (self.subgroup_min_size, self.subgroup_max_size) {
            (min, max) if min == max => plural(u64::from(min), "invocation"),
            (min, max) => format!("{min} to {max} invocations"),
        };
        let lines = table(&[
            ("  backend", format!("{} ({kind})", self.backend)),
            ("  driver", self.driver.clone()),
            ("  binding", format!("{} MiB at most", self.max_storage_buffer_binding_size >> 20)),
            ("  buffer", format!("{} MiB at most", self.max_buffer_size >> 20)),
            ("  subgroup", subgroups),
            ("  features", features),
        ]);
        format!("{}\n{lines}", self.name)
    }
}
