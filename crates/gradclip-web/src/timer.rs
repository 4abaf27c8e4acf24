//! Times steps on the device by both clocks: see [`crate::clock`].

use gradclip::gpu::GpuClipper;
use gradclip::{Error, wgpu};
use js_sys::Promise;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

use crate::clock::{Run, Timing, more, step_of, timing};

#[wasm_bindgen]
extern "C" {
    /// The host's clock, in milliseconds.
    #[wasm_bindgen(js_namespace = performance)]
    pub(crate) fn now() -> f64;
}

/// Runs of each length.
const RUNS: usize = 3;

/// The clocks of a device.
pub(crate) struct Timer<'a> {
    gpu: &'a GpuClipper,
    stamps: Option<Stamps>,
}

/// Two timestamps or more, and where they are read.
struct Stamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    read: wgpu::Buffer,
    count: u32,
}

impl<'a> Timer<'a> {
    pub(crate) fn new(gpu: &'a GpuClipper) -> Self {
        Self { gpu, stamps: Stamps::new(gpu, 2) }
    }

    /// The time of a step. `record` records one.
    pub(crate) async fn time(
        &self,
        record: impl Fn(&mut wgpu::CommandEncoder) -> Result<(), Error>,
    ) -> Result<Timing, Error> {
        // The first run warms up, and compiles.
        self.run(&record, 1).await?;
        let mut steps = 1;
        while let Some(more) = more(steps, self.run(&record, steps).await?.host) {
            steps = more;
        }
        let (mut short, mut long) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            short.push(self.run(&record, steps).await?);
            long.push(self.run(&record, 2 * steps).await?);
        }
        Ok(timing(&short, &long))
    }

    async fn run(
        &self,
        record: impl Fn(&mut wgpu::CommandEncoder) -> Result<(), Error>,
        steps: u32,
    ) -> Result<Run, Error> {
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let stamps = self.stamps.as_ref();
        stamps.inspect(|stamps| stamps.stamp(&mut encoder, 0));
        for _ in 0..steps {
            record(&mut encoder)?;
        }
        stamps.inspect(|stamps| stamps.finish(&mut encoder));
        let commands = encoder.finish();
        let begin = now();
        self.gpu.queue().submit([commands]);
        done(self.gpu.queue()).await;
        let host = (now() - begin) / 1e3;
        let device = match stamps {
            Some(stamps) => {
                let ticks = stamps.ticks().await?;
                Some(ticks[1].saturating_sub(ticks[0]) as f64 / 1e9)
            }
            None => None,
        };
        Ok(Run { steps, host, device })
    }
}

impl Stamps {
    fn new(gpu: &GpuClipper, count: u32) -> Option<Self> {
        let device = gpu.device();
        if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return None;
        }
        let label = Some("gradclip clock");
        let queries = wgpu::QuerySetDescriptor { label, ty: wgpu::QueryType::Timestamp, count };
        let buffer =
            |usage| wgpu::BufferDescriptor { label, size: 8 * u64::from(count), usage, mapped_at_creation: false };
        let (read, resolve) = (wgpu::BufferUsages::MAP_READ, wgpu::BufferUsages::QUERY_RESOLVE);
        Some(Self {
            queries: device.create_query_set(&queries),
            resolved: device.create_buffer(&buffer(resolve | wgpu::BufferUsages::COPY_SRC)),
            read: device.create_buffer(&buffer(read | wgpu::BufferUsages::COPY_DST)),
            count,
        })
    }

    /// A timestamp between other commands: the end of an empty pass.
    fn stamp(&self, encoder: &mut wgpu::CommandEncoder, index: u32) {
        let timestamp_writes = Some(wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: None,
            end_of_pass_write_index: Some(index),
        });
        encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
    }

    /// The last timestamp.
    fn finish(&self, encoder: &mut wgpu::CommandEncoder) {
        self.stamp(encoder, self.count - 1);
        encoder.resolve_query_set(&self.queries, 0..self.count, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.read, 0, None);
    }

    /// In nanoseconds.
    async fn ticks(&self) -> Result<Vec<u64>, Error> {
        Ok(bytemuck::pod_collect_to_vec(&mapped(&self.read).await?))
    }
}

/// The step of the device's clock in seconds, if it has one that moves.
pub(crate) async fn device_step(gpu: &GpuClipper) -> Result<Option<f64>, Error> {
    let Some(stamps) = Stamps::new(gpu, 32) else { return Ok(None) };
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    (0..stamps.count - 1).for_each(|index| stamps.stamp(&mut encoder, index));
    stamps.finish(&mut encoder);
    gpu.queue().submit([encoder.finish()]);
    Ok(step_of(&stamps.ticks().await?).map(|step| step as f64 / 1e9))
}

/// The step of the host's clock in seconds.
pub(crate) fn host_step() -> f64 {
    let next = |last: f64| loop {
        let time = now();
        if time > last {
            break time;
        }
    };
    let (mut least, mut last) = (f64::INFINITY, now());
    for _ in 0..8 {
        let time = next(last);
        least = least.min(time - last);
        last = time;
    }
    least / 1e3
}

/// Waits until the queue has done everything that was submitted.
pub(crate) async fn done(queue: &wgpu::Queue) {
    let promise = Promise::new(&mut |resolve, _| {
        queue.on_submitted_work_done(move || drop(resolve.call0(&JsValue::NULL)));
    });
    // It is never rejected.
    drop(JsFuture::from(promise).await);
}

/// The contents of a buffer that can be mapped.
pub(crate) async fn mapped(buffer: &wgpu::Buffer) -> Result<Vec<u8>, Error> {
    let promise = Promise::new(&mut |resolve, reject| {
        buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            drop(if result.is_ok() { resolve } else { reject }.call0(&JsValue::NULL));
        });
    });
    let lost = |_| Error::DeviceLost("a buffer could not be mapped".into());
    JsFuture::from(promise).await.map_err(lost)?;
    let bytes = buffer.get_mapped_range(..).map_err(|error| Error::Device(error.to_string()))?.to_vec();
    buffer.unmap();
    Ok(bytes)
}
