"""Clips gradients at the speed of memory, with a norm you can trust.

PyTorch: ``clip_grad_norm_``, ``clip_grad_value_``, ``get_total_norm`` and ``clip_grads_with_norm_`` are those of
``torch.nn.utils``. For tensors and arrays of any kind there are ``clip``, ``norm``, ``verify`` and ``sum_examples``, with the
adaptive thresholds ``ZClip``, ``AutoClip`` and ``AdaGC``; for safetensors files ``norm``, ``clip_file`` and ``history``.

Neither PyTorch nor NumPy is imported before it is needed.
"""

from gradclip._clip import ConsecutiveSkips, clip, norm, sum_examples, verify
from gradclip._drop_in import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradclip._files import FileError, clip_file, history
from gradclip._gradclip import AdaGC, AutoClip, DeviceError, NonFiniteError, SkippedError, ZClip, __version__
from gradclip._report import Lost, Mismatch, NonFinite, Report, Segment, Verification

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
