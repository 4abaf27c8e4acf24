//! Guards against a panic, or a hang, when the device that burn works on is gone.

use burn::tensor::{DType, Device};
use gradclip_burn::GradClipper;
use gradclip_burn::gradclip::{Clip, wgpu};

use crate::common::{Net, gradients};

#[test]
fn a_device_that_was_lost() {
    // Registers handles of its own, so that no other test loses its device.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(instance.request_adapter(&Default::default())).expect("a Vulkan device");
    let limits = adapter.limits();
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).expect("a device");
    let backend = adapter.get_info().backend;
    let setup = burn::tensor::wgpu::WgpuSetup { instance, adapter, device, queue, backend };
    let device = Device::wgpu_options().setup(setup.clone()).init().expect("registered");
    gradclip_burn::register_wgpu(&device, &setup).expect("it can clip");
    let net = Net::new(&device);
    let make = || gradients(&net, &device, DType::F32, |_, n| vec![1.0; n]);
    let (mut before, mut after) = (make(), make());
    let mut clipper = GradClipper::new(Clip::norm(1.0));
    clipper.clip(&mut before, &net).expect("the device works");
    clipper.report().wait().expect("clipped");
    setup.device.destroy();
    let result = clipper.clip(&mut after, &net).and_then(|()| clipper.report().wait());
    let error = result.expect_err("the device is gone").to_string();
    assert!(error.contains("lost") || error.contains("destroyed") || error.contains("poisoned"), "{error}");
    // And again, with a plan anew.
    let mut clipper = GradClipper::new(Clip::norm(1.0));
    clipper.clip(&mut after, &net).and_then(|()| clipper.report().wait()).expect_err("the device is gone");
}
