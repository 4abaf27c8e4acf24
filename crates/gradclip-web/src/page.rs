//! What the page and this crate say to each other.

use js_sys::{Function, Promise};
use serde::Serialize;
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(js_namespace = console)]
    fn error(message: &str);
}

/// Lets a panic, which ends the module, say why.
#[wasm_bindgen(start)]
fn start() {
    std::panic::set_hook(Box::new(|panic| error(&panic.to_string())));
}

/// An error as an `Error` of JavaScript. Its name is the variant's, by which the page tells a lost device from others.
pub(crate) fn thrown(error: &gradclip::Error) -> JsValue {
    use gradclip::Error;
    let name = match error {
        Error::DeviceLost(_) => "DeviceLost",
        Error::NoAdapter(_) => "NoAdapter",
        Error::OutOfMemory(_) => "OutOfMemory",
        _ => "Error",
    };
    named(name, &error.to_string())
}

/// The same of a sentence.
pub(crate) fn sentence(text: &str) -> JsValue {
    named("Error", text)
}

fn named(name: &str, message: &str) -> JsValue {
    let error = js_sys::Error::new(message);
    error.set_name(name);
    error.into()
}

pub(crate) fn json(value: &impl Serialize) -> Result<String, JsValue> {
    serde_json::to_string(value).map_err(|error| sentence(&error.to_string()))
}

/// How far something is. The page shows it, and may keep it waiting: while the tab is in the background its times would
/// be wrong.
pub(crate) struct Progress<'a>(pub(crate) &'a Function);

impl Progress<'_> {
    /// Tells that `done` of `total` are done, and what comes next. Whether the tab was in the background since the last
    /// call.
    pub(crate) async fn tell(&self, done: f64, total: f64, next: &str) -> Result<bool, JsValue> {
        let answer = self.0.call3(&JsValue::NULL, &done.into(), &total.into(), &next.into())?;
        Ok(JsFuture::from(Promise::resolve(&answer)).await?.is_truthy())
    }
}
