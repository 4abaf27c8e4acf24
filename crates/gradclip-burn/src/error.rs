//! What can go wrong, and what the caller can do about it.

/// Every error of this crate. The gradients are then all in place, and none is half clipped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The clip itself: non-finite gradients under the policy `Error`, a device that is out of memory or lost, and the
    /// like.
    #[error(transparent)]
    Clip(#[from] gradclip::Error),
    /// The module has no float parameters, so no gradient can be its. Pass the module that was trained.
    #[error("the module has no float parameters; pass the module whose gradients these are")]
    EmptyModule,
    /// None of the gradients belongs to a parameter of the module. Gradients are found by the parameters' ids, which a
    /// module made anew does not share: pass the very module that was differentiated, or its clone.
    #[error(
        "none of the {gradients} gradients belongs to one of the module's {parameters} parameters; pass the module that \
         was differentiated"
    )]
    OtherModule {
        /// How many gradients there are.
        gradients: usize,
        /// How many parameters the module has.
        parameters: usize,
    },
    /// A gradient has another shape than its parameter: it belongs to another module, or to an older one.
    #[error(
        "the gradient of {name:?} is {gradient:?}, its parameter {parameter:?}; pass the module that was differentiated"
    )]
    Shape {
        /// The parameter's path in the module.
        name: String,
        /// The gradient's shape.
        gradient: Vec<usize>,
        /// The parameter's shape.
        parameter: Vec<usize>,
    },
    /// A gradient is of a dtype that has no clip: integers, booleans, quantised numbers. Cast it to a float dtype.
    #[error("the gradient of {name:?} is {dtype}, which cannot be clipped; cast it to a float dtype")]
    Dtype {
        /// The parameter's path in the module.
        name: String,
        /// What it is.
        dtype: String,
    },
    /// burn opened this wgpu device by itself, and hands its device and queue only to who opens it.
    #[error(
        "burn opened {device} by itself; open it with gradclip_burn::open_wgpu before its first use, call \
         gradclip_burn::share with its setup, or choose GradClipper::through_host, which is slower"
    )]
    NotShared {
        /// The device.
        device: String,
    },
    /// The gradients lie on a wgpu device, and this crate was built without its feature `wgpu`.
    #[error(
        "the gradients lie on {device}; add the feature \"wgpu\" of gradclip-burn, or choose GradClipper::through_host, which \
         is slower"
    )]
    WithoutWgpu {
        /// The device.
        device: String,
    },
    /// burn could not open a device, run what makes a gradient, or hand one over.
    #[error("burn failed: {0}")]
    Burn(String),
    /// A report was asked for, but this clipper has not clipped yet.
    #[error("nothing to report: this clipper has not clipped yet")]
    NotClipped,
}
