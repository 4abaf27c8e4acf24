//! The errors, and what the caller can do about them.

/// Every error of this crate. After an error all gradients are in their containers, and none is partly clipped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the library: non-finite gradients under the policy `Error`, a device that is lost or out of memory, and the
    /// like.
    #[error(transparent)]
    Clip(#[from] gradclip::Error),
    /// The module has no float parameters, so it has no gradients. Pass the module that was trained.
    #[error("the module has no float parameters; pass the module whose gradients these are")]
    EmptyModule,
    /// None of the gradients belongs to a parameter of the module. Gradients are found by the ids of the
    /// parameters, and a new module has other ids. Pass the module that was differentiated, or its clone.
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
    /// A gradient has another shape than its parameter: it belongs to another or an older module.
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
    /// A gradient has a dtype that cannot be clipped: integers, booleans, quantised numbers. Cast it to a float dtype.
    #[error("the gradient of {name:?} is {dtype}, which cannot be clipped; cast it to a float dtype")]
    Dtype {
        /// The parameter's path in the module.
        name: String,
        /// Its dtype.
        dtype: String,
    },
    /// burn opened this wgpu device itself. It gives the device and queue only to the caller that opens it.
    #[error(
        "burn opened {device} itself; open it with gradclip_burn::open_wgpu before its first use, call \
         gradclip_burn::register_wgpu with its setup, or choose GradClipper::through_host, which is slower"
    )]
    NotRegistered {
        /// The device.
        device: String,
    },
    /// The gradients are on a wgpu device, and this crate was built without its feature `wgpu`.
    #[error(
        "the gradients are on {device}; add the feature \"wgpu\" of gradclip-burn, or choose GradClipper::through_host, which \
         is slower"
    )]
    WithoutWgpu {
        /// The device.
        device: String,
    },
    /// An optimizer's state is of the parameters that had gradients in its first step, and now others have. Give the same ones
    /// gradients at each step, or make an optimizer for each set.
    #[error(
        "the optimizer's state is of other parameters than those that have gradients now; make an optimizer for each set of \
         parameters"
    )]
    OtherParameters,
    /// burn could not open a device, compute a gradient, or return one.
    #[error("burn failed: {0}")]
    Burn(String),
    /// A report was asked for, but this clipper has not clipped yet.
    #[error("nothing to report: this clipper has not clipped yet")]
    NotClipped,
}
