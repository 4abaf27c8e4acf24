"""Clips gradients at the speed of memory, with a norm you can trust.

PyTorch: ``clip_grad_norm_``, ``clip_grad_value_``, ``get_total_norm`` and ``clip_grads_with_norm_`` are those of
``torch.nn.utils``. For tensors and arrays of any kind there are ``clip``, ``norm``, ``verify`` and ``sum_examples``, with the
adaptive thresholds ``ZClip``, ``AutoClip`` and ``AdaGC``; for safetensors files ``norm``, ``clip_file`` and ``history``.
``SGD``, ``Adagrad``, ``RMSprop``, ``Adam`` and ``AdamW`` are those of ``torch.optim``, with a clip in the same pass.

Neither PyTorch nor NumPy is imported before it is needed.
"""

from typing import TYPE_CHECKING, Any

from gradclip._clip import ConsecutiveSkips, clip, norm, sum_examples, verify
from gradclip._drop_in import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradclip._files import FileError, clip_file, history
from gradclip._gradclip import AdaGC, AutoClip, DeviceError, NonFiniteError, SkippedError, ZClip, __version__
from gradclip._report import Lost, Mismatch, NonFinite, Report, Segment, Verification

if TYPE_CHECKING:
    from gradclip._optim import SGD as SGD
    from gradclip._optim import Adagrad as Adagrad
    from gradclip._optim import Adam as Adam
    from gradclip._optim import AdamW as AdamW
    from gradclip._optim import RMSprop as RMSprop

# Without the optimizers, since `from gradclip import *` would need PyTorch for them.
__all__ = [
    "AdaGC",
    "AutoClip",
    "ConsecutiveSkips",
    "DeviceError",
    "FileError",
    "Lost",
    "Mismatch",
    "NonFinite",
    "NonFiniteError",
    "Report",
    "Segment",
    "SkippedError",
    "Verification",
    "ZClip",
    "__version__",
    "clip",
    "clip_file",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "history",
    "norm",
    "sum_examples",
    "verify",
]

_OPTIMIZERS = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")


def __getattr__(name: str) -> Any:
    if name in _OPTIMIZERS:
        from gradclip import _optim

        return getattr(_optim, name)
    raise AttributeError(f"module 'gradclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OPTIMIZERS])
