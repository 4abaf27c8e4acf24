//! Ranks whose gradients lie on a GPU, beside ranks whose do not.

use std::sync::Arc;

use gradclip_mpi::MpiGroup;
use gradclip_mpi::gradclip::gpu::{GpuClipper, GpuTensor};
use gradclip_mpi::gradclip::processes::ProcessGroup;
use gradclip_mpi::gradclip::wgpu::{self, util::DeviceExt};
use gradclip_mpi::gradclip::{Clip, Clipper, Dtype, Error, NonFinite, Scope};

use crate::gradients::{Gradient, slices, views_mut};
use crate::norms::same_on_all;

/// Two gradients of float32, which a device measures within 1e-6.
fn model() -> Vec<Gradient> {
    vec![
        Gradient::random("embedding", Dtype::F32, &[300, 211], 0.02, 1),
        Gradient::random("head", Dtype::F32, &[1001], 0.1, 5),
    ]
}

#[track_caller]
fn close(mine: &[Gradient], expected: &[Gradient]) {
    for (mine, expected) in mine.iter().zip(expected) {
        assert_eq!(mine.len(), expected.len());
        for (a, b) in mine.numbers().zip(expected.numbers()) {
            assert!((a - b).abs() <= 2e-6 * b.abs(), "{}: {a} and {b}", mine.name);
        }
    }
}

fn open() -> GpuClipper {
    GpuClipper::open().wait().unwrap_or_else(|error| {
        panic!("{error}. This needs a Vulkan device, which may be a software one (Debian: mesa-vulkan-drivers)")
    })
}

pub(crate) fn host_tensors_through_a_gpu_and_not(group: &Arc<MpiGroup>) {
    let gpu = open();
    for clip in [Clip::norm(1.0), Clip::norm(0.5).scope(Scope::Tensor)] {
        let mut whole = model();
        let alone = Clipper::cpu().apply(&clip, &mut views_mut(&mut whole)).expect("finite");
        let expected = slices(&whole, group.rank(), group.size());
        for gpus in [|_: u32| true, |rank: u32| rank % 2 == 1] {
            let mut mine = slices(&model(), group.rank(), group.size());
            let clipper = if gpus(group.rank()) { Clipper::gpu(gpu.clone()) } else { Clipper::cpu() };
            let report =
                clipper.processes(Arc::clone(group) as _).apply(&clip, &mut views_mut(&mut mine)).expect("finite");
            assert!((report.total_norm / alone.total_norm - 1.0).abs() <= 1e-6, "{report:?} and {alone:?}");
            assert!(report.clipped && report.elements == alone.elements, "{report:?} and {alone:?}");
            same_on_all(group, report.total_norm.to_bits());
            close(&mine, &expected);
        }
    }
}

pub(crate) fn plans_on_a_gpu(group: &Arc<MpiGroup>) {
    let gpu = open();
    let (device, queue) = (gpu.device(), gpu.queue());
    let bad_rank = group.size() - 1;
    for policy in [NonFinite::Error, NonFinite::Skip, NonFinite::Drop] {
        for is_bad in [false, true] {
            let clip = Clip::norm(1.0).non_finite(policy);
            let mut mine = slices(&model(), group.rank(), group.size());
            if is_bad && group.rank() == bad_rank {
                mine[1].set(3, f32::NAN);
            }
            let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
            let buffer = |gradient: &Gradient| {
                // No buffer is empty: behind the slice lies something else.
                let contents = &[&gradient.bytes[..], &[1; 4]].concat();
                device.create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage })
            };
            let buffers: Vec<_> = mine.iter().map(buffer).collect();
            let tensor = |(buffer, gradient): (&wgpu::Buffer, &Gradient)| {
                let end = gradient.len() as u64;
                Ok::<_, Error>(GpuTensor::f32(buffer, 0..end)?.named(&gradient.name))
            };
            let tensors: Result<Vec<_>, _> = buffers.iter().zip(&mine).map(tensor).collect();
            let plan = gpu.plan(&clip, &tensors.expect("they fit")).expect("a plan");
            let submit = |record: &dyn Fn(&mut wgpu::CommandEncoder)| {
                let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                record(&mut encoder);
                queue.submit([encoder.finish()]);
            };
            submit(&|encoder| plan.encode_measure(encoder).expect("recorded"));
            plan.merge_across(&**group).wait().expect("the others answer");
            submit(&|encoder| plan.encode_scale(encoder).expect("recorded"));
            let result = plan.report().wait();

            let mut after = mine.clone();
            for (gradient, buffer) in after.iter_mut().zip(&buffers) {
                let len = gradient.bytes.len();
                gradient.bytes.copy_from_slice(&read(&gpu, buffer)[..len]);
            }
            let found = match &result {
                Ok(report) => report.non_finite.clone(),
                Err(Error::NonFinite(elements)) if policy == NonFinite::Error => Some(elements.clone()),
                Err(other) => panic!("{other:?}"),
            };
            let place = found.map(|found| (found.rank, found.tensor, found.index, found.name));
            let expected = is_bad.then(|| (Some(bad_rank), 1, 3, Some("head".to_owned())));
            assert_eq!(place, expected, "{policy:?}");
            if is_bad && policy != NonFinite::Drop {
                // NaN is not itself, but its bytes are.
                assert!(after == mine, "{policy:?}");
                continue;
            }
            let report = result.expect("a report");
            assert!(report.clipped, "{report:?}");
            same_on_all(group, report.total_norm.to_bits());
            // With the one element left out, if it is bad.
            let mut whole = model();
            if is_bad {
                let begin = crate::gradients::slice_range(whole[1].len(), bad_rank, group.size()).start;
                whole[1].set(begin + 3, 0.0);
            }
            Clipper::cpu().apply(&Clip::norm(1.0), &mut views_mut(&mut whole)).expect("finite");
            close(&after, &slices(&whole, group.rank(), group.size()));
        }
    }
}

fn read(gpu: &GpuClipper, buffer: &wgpu::Buffer) -> Vec<u8> {
    let (device, queue) = (gpu.device(), gpu.queue());
    let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
    let descriptor = wgpu::BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
    let copy = device.create_buffer(&descriptor);
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &copy, 0, buffer.size());
    queue.submit([encoder.finish()]);
    copy.slice(..).map_async(wgpu::MapMode::Read, |result| result.expect("mapped"));
    device.poll(wgpu::PollType::wait_indefinitely()).expect("the device works");
    copy.slice(..).get_mapped_range().expect("mapped").to_vec()
}
