"""Clipping, measuring and verifying tensors and arrays in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from gradclip import _fallback, _gradclip, _memory
from gradclip._gradclip import AdaGC, AutoClip, Clip, NonFiniteError, SkippedError, ZClip
from gradclip._memory import Given, Memory
from gradclip._report import Mismatch, Raw, Report, Verification, non_finite, report, total_of
from gradclip._settings import Settings, description, fits, measuring, mode_of, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

Threshold = ZClip | AutoClip | AdaGC
Backend = Literal["auto", "cpu", "gpu"]

# The scopes that must know the dimensions.
SHAPED = ("unit", "example", "example-tensor")


def clip(
    tensors: Any,
    *,
    params: Any = None,
    groups: Mapping[str, float] | None = None,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    threshold: Threshold | None = None,
    given_norm: float | None = None,
    backend: Backend = "auto",
    adapter: str | None = None,
    device_fallback: bool = False,
    group: Any = None,
    **settings: Unpack[Settings],
) -> Report:
    """Clip gradients in place, and report.

    ``tensors``: PyTorch CPU tensors or NumPy arrays (also of ml_dtypes' bfloat16) of float32, float64, float16 and bfloat16,
    mixed, of any shape: one, an iterable, a dict by name, or a ``torch.nn.Module``, whose parameters' gradients are taken
    by name. None is left out. Dense tensors are clipped where they lie; others through a copy that is written back.

    One mode, with N the norm of the elements that share one, divided by ``grad_scale``:

    - ``max_norm``: gradients times min(1, max_norm / (N + eps)), with the norm of ``norm_type`` (2, 1, inf, any p > 0).
      ``eps`` is 1e-6 as in PyTorch; Optax and TensorFlow use 0. (Pascanu, Mikolov, Bengio 2013, algorithm 1)
    - ``max_rms``: N is the root mean square. (Optax, ``clip_by_block_rms``)
    - ``max_average_norm``: N is the L2 norm divided by the number of elements. (TensorFlow 1, ``clip_by_average_norm``)
    - ``agc``: each unit's norm stays below this factor times that of its parameter, and at least ``agc_eps`` (1e-3) of it.
      Give ``params`` in the same order, or by the same names; a module brings its own. (Brock et al. 2021, equation 3)
    - ``clip_value``, ``clip_range``: each element to -clip_value..clip_value, or to (least, largest).

    ``scope``: which elements share a norm: ``"global"``, ``"tensor"``, ``"unit"``, ``"example"``, ``"example-tensor"``.
    ``unit_axis``: which axes number the units: ``"first"``, ``"last"``, ``"optax"``, axes, or ``("over", axes)``.
    ``budget``: how ``"example-tensor"`` divides the threshold: ``"each"``, ``"uniform"``, ``"sized"``.
    ``grad_scale``: the loss scale that the gradients carry; they are divided by it.
    ``non_finite``: what happens if a gradient is NaN or infinite: ``"error"`` (the default of every mode with a norm:
    NonFiniteError, nothing is written), ``"propagate"``, ``"skip"``, ``"zero"``, ``"drop"``.
    ``skip_above``: a step whose norm is above this is skipped: nothing is written, and ``report.skipped`` says so.
    ``report_norm``: whether ``clip_value`` and ``clip_range`` also report the L2 norm before them.

    ``only``, ``exclude``: patterns of names (``*`` any characters, ``?`` one); others are left as they are.
    ``groups``: thresholds by pattern. Each group has a norm of its own; the first pattern that fits counts.
    ``threshold``: a ZClip, AutoClip or AdaGC that follows the norms; the mode's own threshold is an upper bound.
    ``given_norm``: a norm that was measured elsewhere; nothing is measured.
    ``backend="gpu"`` sends the elements through a GPU by wgpu, ``adapter`` chooses it by name.
    ``device_fallback``: tensors on another device are clipped there by PyTorch's own operations.
    ``group``: a torch.distributed group (gloo) whose processes hold parts of the gradients. Each calls this with its own part:
    tensors, which all count, and DTensors, of which replicas count once. All get the same norm, bit for bit, and clip
    alike. The scope is global, and the mode one with a norm.

    Raises NonFiniteError, ValueError (a setting or a tensor does not fit), TypeError (something is no tensor, or of
    another dtype), DeviceError. Nothing has been written then.
    """
    if group is not None:

        def prepare() -> tuple[Clip, Given]:
            _excluded("group", params=params, groups=groups, threshold=threshold, given_norm=given_norm, adapter=adapter)
            _excluded("group", device_fallback=device_fallback or None, backend="gpu" if backend == "gpu" else None)
            return description(settings), _selected(_memory.given(tensors), only, exclude)

        return _over(group, prepare, True)
    found = _selected(_memory.given(tensors), only, exclude)
    if device_fallback and _fallback.needed(found.tensors):
        _excluded("device_fallback", params=params, groups=groups, threshold=threshold, given_norm=given_norm)
        return _fallback.clip(found, settings)
    mode = mode_of(settings)
    scope = _scope(settings)
    clips = [description(settings)]
    of_tensor: list[int] | None = None
    patterns: list[str] = []
    if groups is not None:
        if mode == "clip_range":
            raise ValueError("groups gives one threshold for each pattern, and clip_range needs two")
        if threshold is not None or given_norm is not None:
            raise ValueError("groups cannot be used with threshold or given_norm")
        of_tensor, patterns = _divided(found, groups)
        clips = [description(settings, number(f"groups[{pattern!r}]", groups[pattern])) for pattern in patterns] + clips
    if threshold is not None and given_norm is not None:
        raise ValueError("threshold follows norms that are measured; leave out given_norm")
    norm = None if given_norm is None else number("given_norm", given_norm)
    shaped = scope in SHAPED
    memory = _memory.memory(found.tensors, found.label, found.names, write=True, shaped=shaped)
    parameters = _parameters(found, params, mode, shaped)
    try:
        raws, written = _gradclip.apply(
            clips,
            memory.flat,
            groups=of_tensor,
            params=parameters and parameters.flat,
            threshold=threshold,
            norm=norm,
            backend=_ready(backend),
            adapter=adapter,
        )
    except NonFiniteError as error:
        raise _located(error, found) from None
    _memory.finish(memory, found.tensors, written)
    if of_tensor is None:
        return report(raws[0], found.names, found.places, scope, repr(clips[0]))
    counts = [of_tensor.count(group) for group in range(len(clips))]
    by_pattern = {
        pattern: report(raw, found.names, found.places, scope, repr(clip), count)
        for pattern, raw, clip, count in zip([*patterns, ""], raws, clips, counts)
        if count
    }
    return _together(by_pattern, mode, settings, repr(clips[-1]))


def norm(
    tensors: Any,
    *,
    params: Any = None,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    backend: Backend = "auto",
    adapter: str | None = None,
    device_fallback: bool = False,
    group: Any = None,
    progress: bool = False,
    **settings: Unpack[Settings],
) -> Report:
    """Measure the norm of tensors, arrays or a safetensors file, and write nothing. ``float(report)`` is the norm.

    ``tensors``: as in :func:`clip`, and also what is read-only or converts to a NumPy array, as JAX's arrays do; or the
    path of a safetensors file or of a sharded set's ``*.safetensors.index.json``. Without a mode the report counts
    non-finite elements and goes on (``progress`` shows a file's, by tqdm if that is there); with one (``max_norm=...``) it says what :func:`clip` would do.

    Raises ValueError, TypeError, DeviceError as :func:`clip` does; FileError for a file that cannot be read.
    """
    if is_path(tensors):
        from gradclip import _files

        if params is not None or device_fallback or group is not None:
            raise ValueError("params, device_fallback and group cannot be used with a file")
        return _files.norm(
            tensors, only=only, exclude=exclude, backend=backend, adapter=adapter, progress=progress, **settings
        )
    if group is not None:

        def prepare() -> tuple[Clip, Given]:
            _excluded("group", params=params, device_fallback=device_fallback or None, adapter=adapter)
            _excluded("group", backend="gpu" if backend == "gpu" else None)
            return measuring(settings), _selected(_memory.given(tensors), only, exclude)

        return _over(group, prepare, False)
    found = _selected(_memory.given(tensors), only, exclude)
    if device_fallback and _fallback.needed(found.tensors):
        _excluded("device_fallback", params=params)
        return _fallback.clip(found, settings, measure=True)
    clip = measuring(settings)
    scope = _scope(settings)
    shaped = scope in SHAPED
    memory = _memory.memory(found.tensors, found.label, found.names, write=False, shaped=shaped)
    parameters = _parameters(found, params, "agc" if settings.get("agc") is not None else "max_norm", shaped)
    try:
        raw = _gradclip.measure(
            clip, memory.flat, params=parameters and parameters.flat, backend=_ready(backend), adapter=adapter
        )
    except NonFiniteError as error:
        raise _located(error, found) from None
    return report(raw, found.names, found.places, scope, repr(clip))


def verify(tensors: Any, *, params: Any = None, adapter: str | None = None, **settings: Unpack[Settings]) -> Verification:
    """Clip copies of the tensors on the GPU and on the CPU, and compare norms, decisions and every element.

    ``tensors`` and settings: as in :func:`clip`. Nothing is written. float64 has no GPU arithmetic, and is a ValueError.
    DeviceError if there is no GPU that wgpu reaches.
    """
    found = _memory.given(tensors)
    scope = _scope(settings)
    shaped = scope in SHAPED
    memory = _memory.memory(found.tensors, found.label, found.names, write=False, shaped=shaped)
    parameters = _parameters(found, params, mode_of(settings), shaped)
    _ready("gpu")
    agrees, error, tolerance, same, ulps, mismatch, elements = _gradclip.verify(
        description(settings), memory.flat, params=parameters and parameters.flat, adapter=adapter
    )
    first = None
    if mismatch is not None:
        tensor, index, cpu, gpu, apart = mismatch
        name = found.names[tensor] if found.names else None
        first = Mismatch(found.places[tensor], name, index, cpu, gpu, apart)
    return Verification(agrees, error, tolerance, same, ulps, first, elements)


def sum_examples(
    tensors: Any, *, backend: Backend = "auto", adapter: str | None = None, **settings: Unpack[Settings]
) -> tuple[Report, Any]:
    """Clip each example by itself, and return the sums of the clipped examples: the gradient of DP-SGD before its noise.

    ``tensors``: as in :func:`clip`; dimension 0 of each is the example. They stay as they are. ``scope`` is ``"example"``
    (the default) or ``"example-tensor"``. (Abadi et al. 2016, "Deep learning with differential privacy")

    Returns the report, and the sums: a list, or a dict if names were given; float64 for float64, else float32.
    """
    settings.setdefault("scope", "example")
    found = _memory.given(tensors)
    memory = _memory.memory(found.tensors, found.label, found.names, write=False, shaped=True)
    for i, held in enumerate(memory.held):
        if not held.shape:
            raise ValueError(f"{found.label(i)} is a scalar; dimension 0 must be the example")
    sums = [_memory.zeros_of_example(held) for held in memory.held]
    into = _memory.memory(sums, found.label, found.names, write=True, shaped=True)
    clip = description(settings)
    try:
        raw = _gradclip.sum_examples(clip, memory.flat, into.flat, backend=_ready(backend), adapter=adapter)
    except NonFiniteError as error:
        raise _located(error, found) from None
    result = dict(zip(found.names, sums)) if found.names else sums
    return report(raw, found.names, found.places, _scope(settings), repr(clip)), result


class ConsecutiveSkips:
    """Counts how many steps in a row were skipped, and makes one too many a SkippedError."""

    def __init__(self, max_consecutive: int) -> None:
        self.max_consecutive = max(1, max_consecutive)
        self.skipped = 0

    def count(self, report: Report) -> None:
        """Take in the report of a step."""
        self.skipped = self.skipped + 1 if report.skipped is not None else 0
        if self.skipped >= self.max_consecutive:
            raise SkippedError(f"{self.skipped} steps in a row were skipped: the run has diverged, or the limit is too low")


def is_path(value: Any) -> bool:
    return isinstance(value, str) or hasattr(value, "__fspath__")


def _ready(backend: str) -> str:
    """Prepare the process for a GPU, if that is the backend."""
    if backend == "gpu":
        if "XDG_RUNTIME_DIR" not in os.environ:
            # Mesa's device-select layer prints an error to stderr wherever there is no desktop session.
            os.environ.setdefault("NODEVICE_SELECT", "1")
        # Mesa's drivers bring an LLVM, after which PyTorch's triton, which has another, cannot be loaded: the process
        # would crash. The other order works.
        if "triton" not in sys.modules and importlib.util.find_spec("triton") is not None:
            with contextlib.suppress(Exception):
                importlib.import_module("triton")
    return backend


def _scope(settings: Mapping[str, Any]) -> str:
    default = "unit" if settings.get("agc") is not None else "global"
    return settings.get("scope") or default


def _excluded(by: str, **others: Any) -> None:
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} cannot be used with {by}")


def _over(group: Any, prepare: Callable[[], tuple[Clip, Given]], write: bool) -> Report:
    """Clip or measure over the processes of a group."""
    from gradclip import _sharded

    clip, found, raw, bad = _sharded.run(group, prepare, write)
    quiet: Raw = (*raw[:4], None, *raw[5:])
    return report(quiet, found.names, found.places, "global", repr(clip))._replace(non_finite=bad)


def _located(error: NonFiniteError, found: Given) -> NonFiniteError:
    """The error, with ``non_finite`` as a report has it."""
    count, tensor, index, name = error.raw
    if name is not None and found.names:
        tensor = found.names.index(name)
    error.non_finite = non_finite((count, tensor, index), found.names, found.places)
    if found.names is None:
        error.args = (str(error.args[0]).replace(f"of tensor {tensor};", f"of tensor {found.places[tensor]};", 1),)
    return error


def _list(patterns: str | Iterable[str] | None) -> list[str]:
    return [] if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)


def _selected(found: Given, only: str | Iterable[str] | None, exclude: str | Iterable[str] | None) -> Given:
    wanted, unwanted = _list(only), _list(exclude)
    if not wanted and not unwanted:
        return found
    names = _names(found, "only and exclude")
    keep = [not wanted] * len(names)
    for argument, patterns, keeps in (("only", wanted, True), ("exclude", unwanted, False)):
        for pattern in patterns:
            fitting = [i for i, name in enumerate(names) if fits(pattern)(name)]
            if not fitting:
                raise ValueError(f"{argument} {pattern!r}: no tensor has this name")
            for i in fitting:
                keep[i] = keeps
    return found.only(keep)


def _divided(found: Given, groups: Mapping[str, float]) -> tuple[list[int], list[str]]:
    """The group of each tensor, and the patterns; what no pattern fits is in the group after the last."""
    names, patterns = _names(found, "groups"), list(groups)
    matchers = [fits(pattern) for pattern in patterns]
    of = [next((i for i, fit in enumerate(matchers) if fit(name)), len(patterns)) for name in names]
    for i, pattern in enumerate(patterns):
        if i not in of:
            raise ValueError(f"groups {pattern!r}: no tensor has this name, or earlier patterns take all that have it")
    return of, patterns


def _names(found: Given, argument: str) -> list[str]:
    if found.names is None and found.tensors:
        raise ValueError(f"{argument} goes by names: give the tensors as a dict, or a torch.nn.Module")
    return found.names or []


def _parameters(found: Given, params: Any, mode: str, shaped: bool) -> Memory | None:
    """The parameters that AGC compares with, one for each gradient."""
    if mode != "agc":
        if params is not None:
            raise ValueError("params goes with agc only")
        return None
    if params is None:
        if found.params is None:
            raise ValueError("agc needs the parameters of the gradients: params=...")
        chosen = found.params
    else:
        others = _memory.given(params, "params")
        if found.names and others.names:
            by_name = dict(zip(others.names, others.tensors))
            missing = [name for name in found.names if name not in by_name]
            if missing:
                raise ValueError(f"params has no {missing[0]!r}")
            chosen = [by_name[name] for name in found.names]
        else:
            by_place = dict(zip(others.places, others.tensors))
            if any(place not in by_place for place in found.places):
                raise ValueError(f"params has {len(by_place)} tensors, and tensors has {len(found.places)}")
            chosen = [by_place[place] for place in found.places]
    detached = [getattr(p, "detach", lambda p=p: p)() for p in chosen]
    return _memory.memory(detached, lambda i: f"the parameter of {found.label(i)}", found.names, write=False, shaped=shaped)


def _together(groups: dict[str, Report], mode: str, settings: Mapping[str, Any], line: str) -> Report:
    """The report on all groups."""
    reports = list(groups.values())
    elements = sum(one.elements for one in reports)

    def weigh(elements: int) -> float:
        return float(max(elements, 1) ** {"max_rms": 0.5, "max_average_norm": 1.0}.get(mode, 0.0))

    p = settings.get("norm_type")
    norms = [one.total_norm * weigh(one.elements) for one in reports]
    total = total_of(norms, 2.0 if p is None else number("norm_type", p)) / weigh(elements)
    coefs = [one.clip_coef for one in reports]
    bad = [one.non_finite for one in reports if one.non_finite is not None]
    lost = [one.lost for one in reports if one.lost is not None]
    first = min(bad, key=lambda found: found.tensor, default=None)
    return Report(
        total,
        float("nan") if any(coef != coef for coef in coefs) else min(coefs, default=1.0),
        any(one.clipped for one in reports),
        elements,
        sum(one.tensors for one in reports),
        first and first._replace(count=sum(found.count for found in bad)),
        lost[0]._replace(zero=sum(x.zero for x in lost), infinite=sum(x.infinite for x in lost)) if lost else None,
        next((one.skipped for one in reports if one.skipped is not None), None),
        line,
        sorted((s for one in reports for s in one.segments), key=lambda s: (s.tensor or 0, s.index or 0)),
        groups,
    )
