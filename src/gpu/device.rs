//! The device that everything runs on: opening one, and turning its errors into ours.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_intrusive::channel::shared::{OneshotReceiver, oneshot_channel};

use super::probe::Native;
use crate::Error;
use crate::Waiting;
#[cfg(not(target_arch = "wasm32"))]
use crate::wait::{block_on, may_sleep};

/// Usages of staging buffers: the host reads what the device wrote, or the device reads what the host wrote.
pub(super) const DOWNLOAD: wgpu::BufferUsages = wgpu::BufferUsages::MAP_READ.union(wgpu::BufferUsages::COPY_DST);
pub(super) const UPLOAD: wgpu::BufferUsages = wgpu::BufferUsages::MAP_WRITE.union(wgpu::BufferUsages::COPY_SRC);

/// A buffer that will be mapped once the submission that uses it is done.
#[derive(Debug)]
pub(super) struct Mapping {
    answer: OneshotReceiver<Result<(), wgpu::BufferAsyncError>>,
    after: wgpu::SubmissionIndex,
}

/// The features that a kernel needs to choose one of many buffers. The choice is the same for a whole workgroup, but
/// the shader compiler does not see that.
pub(super) const ARRAYS_OF_BUFFERS: wgpu::Features = wgpu::Features::BUFFER_BINDING_ARRAY
    .union(wgpu::Features::STORAGE_RESOURCE_BINDING_ARRAY)
    .union(wgpu::Features::SAMPLED_TEXTURE_AND_STORAGE_BUFFER_ARRAY_NON_UNIFORM_INDEXING);

#[derive(Clone, Debug)]
pub(super) struct GpuDevice {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    /// Why the device was lost, if it was. Known only for our own devices: a caller's device has the caller's callback.
    lost: Arc<OnceLock<String>>,
    /// What kernels may leave to its arithmetic.
    pub(super) native: Native,
    /// What the driver keeps of compiled pipelines, if it can.
    pub(super) pipelines: Option<wgpu::PipelineCache>,
    #[cfg(target_arch = "wasm32")]
    unanswered: Unanswered,
}

/// The error scopes that a browser has not answered yet, in their order.
#[cfg(target_arch = "wasm32")]
#[derive(Clone, Default)]
struct Unanswered(std::rc::Rc<std::cell::RefCell<std::collections::VecDeque<Answer>>>);

#[cfg(target_arch = "wasm32")]
type Answer = std::pin::Pin<Box<dyn Future<Output = Option<wgpu::Error>>>>;

#[cfg(target_arch = "wasm32")]
impl std::fmt::Debug for Unanswered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Unanswered({})", self.0.borrow().len())
    }
}

impl GpuDevice {
    pub(super) fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self, Error> {
        let opened = Self::of(device.clone(), queue.clone(), Arc::default());
        // A browser cannot be waited for.
        #[cfg(not(target_arch = "wasm32"))]
        let opened = block_on(opened.probed())?;
        Ok(opened)
    }

    fn of(device: wgpu::Device, queue: wgpu::Queue, lost: Arc<OnceLock<String>>) -> Self {
        Self {
            device,
            queue,
            lost,
            native: Native::UNKNOWN,
            pipelines: None,
            #[cfg(target_arch = "wasm32")]
            unanswered: Unanswered::default(),
        }
    }

    /// The same device, with errors of its own to wait for.
    pub(super) fn apart(&self) -> Self {
        #[cfg(target_arch = "wasm32")]
        return Self { unanswered: Unanswered::default(), ..self.clone() };
        #[cfg(not(target_arch = "wasm32"))]
        self.clone()
    }

    async fn probed(self) -> Result<Self, Error> {
        Ok(Self { native: Native::probe(&self).await?, ..self })
    }

    /// Opens a device with all the adapter's limits and the features that help.
    pub(super) async fn open(adapter: &wgpu::Adapter) -> Result<Self, Error> {
        let helpful = wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::SUBGROUP
            | wgpu::Features::SHADER_F16
            | wgpu::Features::PIPELINE_CACHE
            | ARRAYS_OF_BUFFERS;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("gradclip"),
            required_features: adapter.features() & helpful,
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let (device, queue) = adapter.request_device(&descriptor).await.map_err(|e| Error::Device(e.to_string()))?;
        let lost: Arc<OnceLock<String>> = Arc::default();
        let told = Arc::clone(&lost);
        device.set_device_lost_callback(move |reason, message| {
            // Only the first reason is kept.
            let _ = told.set(format!("{reason:?}: {message}"));
        });
        // An error outside our scopes would otherwise end the process.
        device.on_uncaptured_error(Arc::new(|error| log::error!("uncaptured GPU error: {error}")));
        Self::of(device, queue, lost).probed().await
    }

    /// The same device with a cache of pipelines that holds these bytes, or nothing if they are of another device or
    /// driver. None if the device was made without the feature.
    #[allow(unsafe_code)]
    pub(super) fn caching(&self, bytes: &[u8]) -> Result<Option<Self>, Error> {
        if !self.device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return Ok(None);
        }
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("gradclip"), data: Some(bytes), fallback: true };
        // SAFETY: the caller of `GpuClipper::with_pipeline_cache` promises that the bytes are those of a cache, or not
        // any that pass for them. wgpu compares their header with the device and the driver.
        let pipelines = self.scoped(|| unsafe { self.device.create_pipeline_cache(&descriptor) })?;
        Ok(Some(Self { pipelines: Some(pipelines), ..self.clone() }))
    }

    pub(super) fn check_not_lost(&self) -> Result<(), Error> {
        self.lost.get().map_or(Ok(()), |reason| Err(Error::DeviceLost(reason.clone())))
    }

    /// Runs `f`, unless the device is known to be lost, and returns the device's errors meanwhile as ours. On a lost
    /// device wgpu does nothing, and tells no scope.
    ///
    /// Error scopes belong to the thread. On native platforms their answers are ready at once. A browser gives them
    /// later: [`GpuDevice::told`] waits for them.
    pub(super) fn scoped<T>(&self, f: impl FnOnce() -> T) -> Result<T, Error> {
        let scopes = self.begin_scopes()?;
        let result = f();
        self.end_scopes(scopes)?;
        Ok(result)
    }

    fn begin_scopes(&self) -> Result<[wgpu::ErrorScopeGuard; 3], Error> {
        self.check_not_lost()?;
        let filters = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory];
        Ok(filters.map(|filter| self.device.push_error_scope(filter)))
    }

    fn end_scopes(&self, scopes: [wgpu::ErrorScopeGuard; 3]) -> Result<(), Error> {
        let answers = scopes.into_iter().rev().map(wgpu::ErrorScopeGuard::pop);
        #[cfg(target_arch = "wasm32")]
        {
            self.unanswered.0.borrow_mut().extend(answers.map(|answer| Box::pin(answer) as Answer));
            Ok(())
        }
        #[cfg(not(target_arch = "wasm32"))]
        {
            let error = answers.fold(None, |error, answer| error.or(ready(answer).flatten()));
            error.map_or(Ok(()), |error| Err(self.ours(error)))
        }
    }

    /// Waits until a browser has told the errors of all earlier calls, and returns the first. Native platforms tell
    /// them at once: [`GpuDevice::scoped`] returns them.
    pub(super) async fn told(&self) -> Result<(), Error> {
        #[cfg(target_arch = "wasm32")]
        loop {
            let next = self.unanswered.0.borrow_mut().pop_front();
            let Some(answer) = next else { break };
            if let Some(error) = answer.await {
                // What follows it are mostly its consequences.
                self.unanswered.0.borrow_mut().clear();
                return Err(self.ours(error));
            }
        }
        Ok(())
    }

    fn ours(&self, error: wgpu::Error) -> Error {
        match error {
            wgpu::Error::OutOfMemory { source } => Error::OutOfMemory(source.to_string()),
            wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
                // wgpu does not tell scopes that a device was lost: what it then gives out is merely invalid. It calls
                // back about the loss once the device's last work is done.
                let timeout = Some(Duration::from_secs(1));
                let idle = wgpu::PollType::Wait { submission_index: None, timeout };
                let polled = self.catching_loss(|| self.device.poll(idle)).err();
                let lost = polled.filter(|error| matches!(error, Error::DeviceLost(_)));
                lost.or(self.check_not_lost().err()).unwrap_or_else(|| Error::Device(one_line(&description)))
            }
        }
    }

    /// A buffer with these contents.
    pub(super) fn filled(
        &self,
        label: &str,
        contents: &[u8],
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer, Error> {
        let buffer = self.storage(label, contents.len() as u64, usage | wgpu::BufferUsages::COPY_DST)?;
        self.scoped(|| self.queue.write_buffer(&buffer, 0, contents))?;
        Ok(buffer)
    }

    /// A buffer of `size` bytes, all 0.
    pub(super) fn storage(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer, Error> {
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false };
        self.scoped(|| self.device.create_buffer(&descriptor))
    }

    /// A buffer of `size` bytes that the host writes first.
    pub(super) fn mapped_at_creation(&self, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer, Error> {
        let label = Some("gradclip staging");
        let descriptor = wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: true };
        self.scoped(|| self.device.create_buffer(&descriptor))
    }

    /// Copies parts of buffers (offset and size) to the host, one after another, and waits for them.
    pub(super) async fn read(&self, parts: &[(&wgpu::Buffer, u64, u64)]) -> Result<Vec<u8>, Error> {
        let size = parts.iter().map(|(.., size)| size).sum();
        let staging = self.storage("gradclip readback", size, DOWNLOAD)?;
        let after = self.scoped(|| {
            let mut encoder = self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut at = 0;
            for (buffer, offset, size) in parts {
                encoder.copy_buffer_to_buffer(buffer, *offset, &staging, at, Some(*size));
                at += size;
            }
            self.queue.submit([encoder.finish()])
        })?;
        self.mapped(self.map(&staging, wgpu::MapMode::Read, size, after)?).await?;
        let bytes = staging.get_mapped_range(..).map_err(|e| Error::Device(e.to_string()))?.to_vec();
        staging.unmap();
        Ok(bytes)
    }

    /// Asks to map the first `size` bytes of a buffer once the submission `after`, which uses it, is done.
    pub(super) fn map(
        &self,
        buffer: &wgpu::Buffer,
        mode: wgpu::MapMode,
        size: u64,
        after: wgpu::SubmissionIndex,
    ) -> Result<Mapping, Error> {
        let (sender, answer) = oneshot_channel();
        self.scoped(|| {
            buffer.map_async(mode, ..size, move |result| {
                // The receiver is gone if the future that asked was dropped; then nobody wants the answer.
                let _ = sender.send(result);
            });
        })?;
        Ok(Mapping { answer, after })
    }

    pub(super) async fn mapped(&self, mapping: Mapping) -> Result<(), Error> {
        if let Some(Ok(())) = self.answer(&mapping.answer, mapping.after).await? {
            return Ok(());
        }
        self.check_not_lost()?;
        Err(Error::DeviceLost("a buffer could not be mapped".into()))
    }

    /// Submits commands, if there are any, and waits until the device has done them and everything submitted before.
    pub(super) async fn run(&self, commands: Option<wgpu::CommandBuffer>) -> Result<(), Error> {
        let (sender, receiver) = oneshot_channel();
        let after = self.scoped(|| {
            let after = self.queue.submit(commands);
            self.queue.on_submitted_work_done(move || {
                // The receiver is gone if the future was dropped; then nobody waits.
                let _ = sender.send(());
            });
            after
        })?;
        match self.answer(&receiver, after).await? {
            // wgpu calls back for a lost device too.
            Some(()) => self.check_not_lost(),
            None => Err(Error::DeviceLost("it dropped a callback".into())),
        }
    }

    /// Waits for what a callback of the device sends after a submission. None if the callback was dropped uncalled.
    ///
    /// A native device makes progress only when polled, so this future polls it, under any executor. A browser needs no
    /// polling, but tells only here what was wrong with the calls before.
    #[cfg_attr(target_arch = "wasm32", expect(unused_variables, reason = "a browser knows by itself"))]
    async fn answer<T>(&self, receiver: &OneshotReceiver<T>, after: wgpu::SubmissionIndex) -> Result<Option<T>, Error> {
        self.told().await?;
        let mut answer = std::pin::pin!(receiver.receive());
        #[cfg(not(target_arch = "wasm32"))]
        let mut after = Some(after);
        std::future::poll_fn(|context| {
            #[cfg(not(target_arch = "wasm32"))]
            if may_sleep()
                && let Some(after) = after.take()
                && let Err(error) = self.wait(after)
            {
                return std::task::Poll::Ready(Err(error));
            }
            if let std::task::Poll::Ready(result) = answer.as_mut().poll(context) {
                return std::task::Poll::Ready(Ok(result));
            }
            if let Err(error) = self.poll() {
                return std::task::Poll::Ready(Err(error));
            }
            if !cfg!(target_arch = "wasm32") {
                context.waker().wake_by_ref();
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Runs the callbacks of finished work.
    pub(super) fn poll(&self) -> Result<(), Error> {
        self.catching_loss(|| self.device.poll(wgpu::PollType::Poll))
    }

    /// Sleeps until a submission is done.
    #[cfg(not(target_arch = "wasm32"))]
    fn wait(&self, submission: wgpu::SubmissionIndex) -> Result<(), Error> {
        let wait = wgpu::PollType::Wait { submission_index: Some(submission), timeout: None };
        self.catching_loss(|| self.device.poll(wait))
    }

    /// Polls, and returns wgpu's panic as an error: wgpu panics if the device hangs or is gone. A poll also runs the
    /// caller's own callbacks; their panics go on to the caller.
    fn catching_loss<E: std::fmt::Display>(
        &self,
        poll: impl FnOnce() -> Result<wgpu::PollStatus, E>,
    ) -> Result<(), Error> {
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(poll)) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Error::Device(error.to_string())),
            Err(panic) => {
                self.check_not_lost()?;
                let message =
                    panic.downcast_ref::<String>().filter(|message| message.starts_with("Error in Device::poll"));
                match message {
                    Some(message) => Err(Error::DeviceLost(one_line(message))),
                    None => std::panic::resume_unwind(panic),
                }
            }
        }
    }
}

/// All adapters that this machine has, hardware and software.
///
/// The environment variables of wgpu (`WGPU_BACKEND` and the like) are honoured.
pub fn adapters() -> Waiting<'static, Vec<wgpu::Adapter>> {
    Waiting::new(async {
        let mut all = primary().enumerate_adapters(wgpu::Backends::all()).await;
        all.extend(secondary().enumerate_adapters(wgpu::Backends::all()).await);
        all
    })
}

/// The adapter with the highest performance, or the first that has `name` in its name, in upper or lower case.
pub(super) async fn adapter(name: Option<&str>) -> Result<wgpu::Adapter, Error> {
    let Some(name) = name else {
        let options = wgpu::RequestAdapterOptions {
            power_preference: wgpu::PowerPreference::HighPerformance,
            ..Default::default()
        };
        let is_hardware = |adapter: &wgpu::Adapter| adapter.get_info().device_type != wgpu::DeviceType::Cpu;
        let first = primary().request_adapter(&options).await.ok();
        if let Some(adapter) = first.as_ref().filter(|a| is_hardware(a)) {
            return Ok(adapter.clone());
        }
        // Old hardware may have OpenGL alone.
        let second = secondary().request_adapter(&options).await.ok();
        let (hardware, software): (Vec<_>, Vec<_>) = [first, second].into_iter().flatten().partition(is_hardware);
        let found = hardware.into_iter().chain(software).next();
        return found.ok_or_else(|| Error::NoAdapter(String::new()));
    };
    let matches = |a: &wgpu::Adapter| a.get_info().name.to_lowercase().contains(&name.to_lowercase());
    let all = adapters().await;
    let names: Vec<_> = all.iter().map(|a| a.get_info().name).collect();
    all.into_iter()
        .find(matches)
        .ok_or_else(|| Error::NoAdapter(format!(" whose name contains {name:?} (there are: {names:?})")))
}

/// The instance of Vulkan, Metal and DirectX. There is one for the process: wgpu panics if a buffer meets a device of
/// another instance, but returns an error if it meets another device of its own.
#[cfg(not(target_arch = "wasm32"))]
fn primary() -> &'static wgpu::Instance {
    static PRIMARY: OnceLock<wgpu::Instance> = OnceLock::new();
    PRIMARY.get_or_init(|| instance(wgpu::Backends::PRIMARY))
}

#[cfg(target_arch = "wasm32")]
fn primary() -> wgpu::Instance {
    instance(wgpu::Backends::PRIMARY)
}

/// An instance of OpenGL: a new one for each use, because wgpu panics if two threads use the adapters of one at once.
fn secondary() -> wgpu::Instance {
    instance(wgpu::Backends::SECONDARY)
}

fn instance(backends: wgpu::Backends) -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    descriptor.backends &= backends;
    wgpu::Instance::new(descriptor)
}

/// The answer of a future, if it is ready.
#[cfg(not(target_arch = "wasm32"))]
fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        std::task::Poll::Ready(answer) => Some(answer),
        std::task::Poll::Pending => None,
    }
}

/// wgpu's descriptions are indented trees; an error of ours is one line.
fn one_line(description: &str) -> String {
    let parts = description.lines().map(str::trim).filter(|l| !l.is_empty() && *l != "Caused by:");
    parts.collect::<Vec<_>>().join(": ")
}
