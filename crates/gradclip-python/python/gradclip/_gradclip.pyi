"""The Rust part. Use what the package itself offers."""

from collections.abc import Sequence
from typing import Any

from gradclip._memory import Flat
from gradclip._report import NonFinite, Raw

__version__: str

class NonFiniteError(RuntimeError):
    """Gradients are NaN or infinite, under the policy "error". Nothing was written."""

    #: How many there are, and where the first is. None if only the message says it.
    non_finite: NonFinite | None
    raw: tuple[Any, ...]

class SkippedError(RuntimeError):
    """Too many steps in a row were skipped. Nothing was written."""

class DeviceError(RuntimeError):
    """The device cannot do this. The gradients are as they were."""

class Clip:
    def __init__(
        self,
        mode: str,
        threshold: float,
        least: float = 0.0,
        *,
        norm_type: float | None = None,
        scope: str | None = None,
        unit_axis: Any = None,
        budget: str | None = None,
        eps: float | None = None,
        agc_eps: float | None = None,
        grad_scale: float = 1.0,
        non_finite: str | None = None,
        skip_above: float | None = None,
        report_norm: bool = False,
    ) -> None: ...

class Optimizer:
    def __init__(
        self,
        algorithm: str,
        *,
        lr: float,
        weight_decay: float,
        maximize: bool = False,
        momentum: float | None = None,
        dampening: float | None = None,
        nesterov: bool = False,
        lr_decay: float | None = None,
        initial_accumulator_value: float | None = None,
        alpha: float | None = None,
        centered: bool = False,
        betas: Sequence[float] | None = None,
        amsgrad: bool = False,
        eps: float | None = None,
    ) -> None: ...
    def state_tensors(self) -> list[str]: ...

class ZClip:
    """Clips a global norm that stands out from the mean of the norms before it (arXiv 2504.02507)."""

    def __init__(
        self,
        *,
        alpha: float | None = None,
        z_threshold: float | None = None,
        warm_up: int | None = None,
        skip_above_z: float | None = None,
    ) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

class AutoClip:
    """Clips a global norm to a percentile of the norms so far (arXiv 2007.14469)."""

    def __init__(
        self, *, percentile: float | None = None, history: int | None = None, warm_up: int | None = None
    ) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

class AdaGC:
    """Clips each tensor to a multiple of the mean of its own norms (arXiv 2502.11034)."""

    def __init__(
        self,
        *,
        lambda_rel: float | None = None,
        lambda_abs: float | None = None,
        beta: float | None = None,
        warm_up: int | None = None,
    ) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

def apply(
    clips: Sequence[Clip],
    tensors: Flat,
    *,
    groups: list[int] | None = None,
    params: Flat | None = None,
    threshold: ZClip | AutoClip | AdaGC | None = None,
    norm: float | None = None,
    backend: str = "cpu",
    adapter: str | None = None,
) -> tuple[list[Raw], list[int] | None]: ...
def plain(
    tensors: list[Any], classes: tuple[type, ...], exchange: Any, alike: int
) -> tuple[bytes, bytes, bytes] | None: ...
def measure(
    clip: Clip, tensors: Flat, *, params: Flat | None = None, backend: str = "cpu", adapter: str | None = None
) -> Raw: ...
def sum_examples(clip: Clip, tensors: Flat, sums: Flat, *, backend: str = "cpu", adapter: str | None = None) -> Raw: ...
def verify(
    clip: Clip, tensors: Flat, *, params: Flat | None = None, adapter: str | None = None
) -> tuple[bool, float, float, bool, int, tuple[int, int, float, float, int] | None, int]: ...
def step(
    clip: Clip, optimizers: list[Optimizer], groups: list[int], counts: list[int] | None, tensors: Flat, grads: Flat
) -> Raw: ...
def partial(clip: Clip, tensors: Flat, counted: list[bool]) -> bytes: ...
def finish(
    clip: Clip, partials: list[bytes], tensors: Flat | None
) -> tuple[Raw, list[int] | None, int | None, str | None]: ...
def main(arguments: list[str]) -> int: ...
