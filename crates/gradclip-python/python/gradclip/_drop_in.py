"""The functions of ``torch.nn.utils`` that clip gradients, with the same signatures, returns and treatment of NaN."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from gradclip import _fallback, _gradclip, _memory
from gradclip._gradclip import Clip, NonFiniteError
from gradclip._memory import CODES, Flat, Given

if TYPE_CHECKING:
    from torch import Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    device_fallback: bool = False,
    group: Any = None,
) -> Tensor:
    """Clip the gradients of parameters by their norm, in place, as ``torch.nn.utils.clip_grad_norm_`` does.

    ``parameters``: an iterable of tensors, or one; those without a gradient are left out. ``max_norm``: 0 or more.
    ``norm_type``: 1, 2, inf or any p > 0. ``foreach`` is accepted and changes nothing. ``device_fallback``: gradients on another
    device are clipped there by PyTorch's own operations. ``group``: a torch.distributed group (gloo) whose processes hold parts of
    the gradients, as tensors or DTensors; each calls this with its own, and all clip by the norm of everything.

    Returns the norm before the clip, a tensor without dimensions: float32, or float64 if a gradient is, and with ``group``. Without gradients
    it is 0. Gradients are multiplied by max_norm / (norm + 1e-6) if that is below 1; if not, nothing is written.

    A NaN makes all gradients NaN, as in PyTorch; with ``error_if_nonfinite`` it is a RuntimeError, and nothing is written.
    Raises ValueError for a ``max_norm`` that is negative or NaN, a ``norm_type`` of 0 or less, and gradients that share memory;
    TypeError for gradients that are sparse, of another dtype or without data; DeviceError on another device.
    """
    import torch

    policy = "error" if error_if_nonfinite else "propagate"
    if group is not None:

        def prepare() -> tuple[Clip, Given]:
            grads = _grads(torch, parameters)
            return Clip("norm", float(max_norm), norm_type=float(norm_type), non_finite=policy), _given(grads)

        return _over(torch, group, prepare, float(norm_type), write=True)
    grads = _grads(torch, parameters, warn=True)
    p, limit = float(norm_type), float(max_norm)
    clip = Clip("norm", limit, norm_type=p, non_finite=policy)
    if not grads:
        return torch.tensor(0.0)
    if device_fallback and _fallback.needed(grads):
        settings = {"max_norm": limit, "norm_type": p, "non_finite": policy}
        found = _explained(_fallback.clip, p, _given(grads), settings)
        return _tensor(torch, grads, found.total_norm)
    memory = _memory.memory(grads, _label, None, write=True, as_torch=True)
    raws, written = _explained(_gradclip.apply, p, [clip], memory.flat)
    _memory.finish(memory, grads, written)
    return torch.full((), raws[0][0], dtype=_dtype(torch, memory.flat), device=_CPU)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    device_fallback: bool = False,
    group: Any = None,
) -> Tensor:
    """Measure the norm of tensors together, as ``torch.nn.utils.get_total_norm`` does. Nothing is written.

    Arguments, return and errors are those of :func:`clip_grad_norm_`, but ``tensors`` are what is measured, not their
    gradients.
    """
    import torch

    policy = "error" if error_if_nonfinite else "propagate"
    if group is not None:

        def prepare() -> tuple[Clip, Given]:
            listed = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            return Clip("norm", float("inf"), norm_type=float(norm_type), non_finite=policy), _given(listed)

        return _over(torch, group, prepare, float(norm_type), write=False)
    measured = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    p = float(norm_type)
    clip = Clip("norm", float("inf"), norm_type=p, non_finite=policy)
    if not measured:
        return torch.tensor(0.0)
    if device_fallback and _fallback.needed(measured):
        settings = {"max_norm": float("inf"), "norm_type": p, "non_finite": policy}
        found = _explained(_fallback.clip, p, _given(measured), settings, measure=True)
        return _tensor(torch, measured, found.total_norm)
    memory = _memory.memory(measured, _label, None, write=False)
    norm = _explained(_gradclip.measure, p, clip, memory.flat)[0]
    return torch.full((), norm, dtype=_dtype(torch, memory.flat), device=_CPU)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor | float,
    foreach: bool | None = None,
    *,
    device_fallback: bool = False,
) -> None:
    """Clip the gradients of parameters by a norm that is known, as ``torch.nn.utils.clip_grads_with_norm_`` does.

    ``total_norm``: a tensor of one element, or a number, 0 or more. The rest is as in :func:`clip_grad_norm_`.
    """
    import torch

    grads = _grads(torch, parameters)
    limit, norm = float(max_norm), float(getattr(total_norm, "full_tensor", lambda: total_norm)())
    clip = Clip("norm", limit, non_finite="propagate")
    if not grads:
        return
    grads = [_local(grad) for grad in grads]
    if norm != norm or (device_fallback and _fallback.needed(grads)):
        coef = _fallback._coefficient(norm, limit, 1e-6)
        with torch.no_grad():
            for grad in grads if coef != 1.0 else []:
                grad.mul_(coef)
        return
    memory = _memory.memory(grads, _label, None, write=True, as_torch=True)
    _memory.finish(memory, grads, _gradclip.apply([clip], memory.flat, norm=norm)[1])


def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
    *,
    device_fallback: bool = False,
) -> None:
    """Clip each element of the gradients of parameters to -clip_value..clip_value, as ``torch.nn.utils.clip_grad_value_`` does.

    ``clip_value``: 0 or more, else ValueError. NaN stays NaN. A gradient whose elements all lie within is not written.
    """
    import torch

    grads = _grads(torch, parameters)
    bound = float(clip_value)
    clip = Clip("value", bound, -bound)
    if not grads:
        return
    grads = [_local(grad) for grad in grads]
    if device_fallback and _fallback.needed(grads):
        _fallback.clip(_given(grads), {"clip_value": bound})
        return
    memory = _memory.memory(grads, _label, None, write=True, as_torch=True)
    _memory.finish(memory, grads, _gradclip.apply([clip], memory.flat)[1])


def _grads(torch: Any, parameters: Any, warn: bool = False) -> list[Any]:
    if isinstance(parameters, torch.Tensor):
        return [] if parameters.grad is None else [parameters.grad]
    if isinstance(parameters, (str, bytes)) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, not {type(parameters).__name__}")
    listed = list(parameters)
    if warn and not listed and isinstance(parameters, types.GeneratorType):
        warnings.warn("parameters is an empty generator; there is nothing to clip", stacklevel=3)
    try:
        grads = [p.grad for p in listed]
    except AttributeError:
        wrong = next(p for p in listed if not hasattr(p, "grad"))
        raise TypeError(f"parameters holds a {type(wrong).__name__}; it must hold tensors") from None
    return [grad for grad in grads if grad is not None]


def _local(grad: Any) -> Any:
    """The part of this process, if it is a DTensor: each element is clipped by itself, or by a norm that is known."""
    to_local = getattr(grad, "to_local", None)
    return grad if to_local is None else to_local().detach()


def _label(i: int) -> str:
    return f"gradient {i}"


def _given(grads: list[Any]) -> Given:
    return Given(None, grads, list(range(len(grads))), None)


def _over(torch: Any, group: Any, prepare: Callable[[], tuple[Clip, Given]], p: float, write: bool) -> Any:
    """The norm over the processes of a group: float64 on all, since their parts may have any dtype."""
    from gradclip import _sharded

    _, _, raw, _ = _explained(_sharded.run, p, group, prepare, write)
    return torch.full((), raw[0], dtype=torch.float64, device=_CPU)


# Whatever the default device is.
_CPU = "cpu"


def _dtype(torch: Any, flat: Flat) -> Any:
    """That of a norm: float64 if a tensor is, else float32."""
    return torch.float64 if CODES["float64"] in flat[2] else torch.float32


def _tensor(torch: Any, tensors: list[Any], norm: float) -> Any:
    """The norm as a tensor without dimensions, on the device of the first."""
    wide = torch.float64 in {t.dtype for t in tensors}
    return torch.full((), norm, dtype=torch.float64 if wide else torch.float32, device=tensors[0].device)


def _explained(call: Any, p: float, *arguments: Any, **named: Any) -> Any:
    try:
        return call(*arguments, **named)
    except NonFiniteError as error:
        what = str(error).partition(";")[0].replace("of tensor", "of gradient")
        error.args = (
            f"The total norm of order {p} for gradients from `parameters` is non-finite, so it cannot be clipped. To"
            " disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            f" ({what})",
        )
        raise
