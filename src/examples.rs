//! Checks of sums of clipped examples.

use crate::error::tensor_label;
use crate::tensor::Spec;
use crate::{Clip, Dtype, Error, Scope};

/// Checks that the clip is by example, and that each tensor has a sum as long as one example, in the wider type.
///
/// # Errors
/// [`Error::Usage`], [`Error::Tensor`], and those of [`Clip::check`].
pub(crate) fn check_sums<'a>(
    clip: &Clip,
    tensors: impl ExactSizeIterator<Item = Spec<'a>>,
    sums: impl ExactSizeIterator<Item = Spec<'a>>,
) -> Result<(), Error> {
    clip.check()?;
    if clip.measured().is_none() || !matches!(clip.scope, Scope::Example | Scope::ExampleTensor) {
        return Err(Error::usage("only examples are summed: the scope must be Example or ExampleTensor"));
    }
    if tensors.len() != sums.len() {
        return Err(Error::usage(format!("sums of examples: {} given, {} needed", sums.len(), tensors.len())));
    }
    for (i, (tensor, sum)) in tensors.zip(sums).enumerate() {
        let fail = |reason| Err(Error::Tensor { tensor: tensor_label(tensor.name, i), reason });
        let wide = if tensor.dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
        if sum.dtype != wide {
            return fail(format!("its sum must be {wide}, not {}", sum.dtype));
        }
        if tensor.rank() == 0 {
            return fail("it is a scalar, and has no dimension 0 to take examples along".into());
        }
        // Without examples, the length of one is unknown.
        let elements = tensor.first().and_then(|examples| tensor.len.checked_div(examples));
        if let Some(elements) = elements.filter(|elements| *elements != sum.len) {
            return fail(format!("an example has {elements} elements, its sum {}", sum.len));
        }
    }
    Ok(())
}
