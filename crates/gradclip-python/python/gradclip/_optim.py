"""The optimizers of ``torch.optim``, with a clip in the same pass. Importing this module imports PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch

from gradclip import _gradclip, _memory
from gradclip._clip import _located
from gradclip._gradclip import Clip, DeviceError, NonFiniteError
from gradclip._memory import Given
from gradclip._report import Report, report
from gradclip._settings import MODES, Policy, description, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

HALVES = (torch.float16, torch.bfloat16)
# In which steps can be counted.
COUNTS = (torch.float32, torch.float64)
# Older gradient scalers would hand themselves over as an argument of `step`. Under them PyTorch unscales and skips.
TAKES_SCALE = int(torch.__version__.partition(".")[0]) >= 2


class ClipSettings(TypedDict, total=False):
    """What describes the clip before a step: at most one of the first five, and what goes with it."""

    max_norm: float | None
    max_rms: float | None
    max_average_norm: float | None
    clip_value: float | None
    clip_range: tuple[float, float] | None
    norm_type: float | str | None
    scope: Literal["global", "tensor"] | None
    non_finite: Policy | None
    skip_above: float | None


def _description(clip: Mapping[str, Any], grad_scale: float) -> Clip:
    """The clip that the settings describe. Without any it lets everything pass, in one pass."""
    unknown = [name for name in clip if name not in ClipSettings.__annotations__]
    if unknown:
        raise TypeError(f"there is no argument {unknown[0]!r}")
    if clip.get("scope") not in (None, "global", "tensor"):
        raise ValueError(f'scope is {clip["scope"]!r}; the scope of a step must be "global" or "tensor"')
    settings = {name: value for name, value in clip.items() if value is not None}
    if settings in ({}, {"non_finite": "propagate"}):
        settings = {"clip_range": (-math.inf, math.inf)}
    elif not any(name in MODES for name in settings):
        settings["max_norm"] = math.inf
    return description({**settings, "grad_scale": grad_scale})


class _Clipping:
    """What the five optimizers share."""

    # The name of the algorithm, and those of its settings.
    _algorithm: str
    _settings: tuple[str, ...]
    _step_supports_amp_scaling = TAKES_SCALE

    clip: ClipSettings
    report: Report | None
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: dict[Any, dict[str, Any]]

    def _begin(self, clip: ClipSettings, settings: Mapping[str, Any]) -> None:
        """Check the settings, before PyTorch does: our errors name them."""
        self.clip, self.report = clip, None
        _description(clip, 1.0)
        self._optimizer(settings)

    def _optimizer(self, group: Mapping[str, Any]) -> _gradclip.Optimizer:
        algorithm = self._algorithm
        if algorithm.startswith("Adam"):
            # PyTorch's Adam is AdamW once it has loaded AdamW's settings, and the other way round.
            algorithm = "AdamW" if group.get("decoupled_weight_decay", algorithm == "AdamW") else "Adam"
        settings: dict[str, Any] = {}
        for name in (*self._settings, "lr", "weight_decay", "maximize"):
            value = group[name]
            if name == "betas":
                settings[name] = [number(name, beta) for beta in value]
            elif isinstance(value, bool):
                settings[name] = value
            else:
                settings[name] = number(name, value)
        return _gradclip.Optimizer(algorithm, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own: ``{"params": [...], "lr": ...}``."""
        self._optimizer({**self.defaults, **param_group})
        super().add_param_group(param_group)  # type: ignore[misc]
        try:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                _check_device(p, f"parameter {i} of the group")
        except DeviceError:
            self.param_groups.pop()
            raise

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None, *, grads: Iterable[Any] | None = None) -> Any:
        """Clip and take a step in one. Gradients are only read.

        ``closure``: computes the loss and the gradients anew, and returns the loss, which ``step`` returns too.
        ``grads``: a gradient or None for each parameter, in the order of the groups, in place of ``.grad``. They may have
        another dtype than the parameter: bfloat16 beside float32.

        Parameters without a gradient are left out, and keep a count of steps of their own. ``report`` then holds the
        report. Raises NonFiniteError under the policy ``"error"``; ValueError if a setting or a gradient does not fit;
        TypeError if a tensor is sparse or of another dtype; DeviceError for a parameter on another device. Nothing has
        been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A gradient scaler sets these for the time of a step.
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        clip = _description(self.clip, 1.0 if scale is None else number("grad_scale", scale))
        optimizers = [self._optimizer(group) for group in self.param_groups]
        found, groups = self._found(grads)
        params = found.params or []
        if found_inf is not None and float(found_inf) != 0.0:
            elements = sum(p.numel() for p in params)
            nan = math.nan
            self.report = Report(nan, nan, False, elements, len(params), None, None, "non-finite", repr(clip), [], {})
            return loss
        # PyTorch's SGD does not count. Its first step is the one that finds no direction.
        counts = [int("momentum_buffer" in self.state.get(p, ())) for p in params] if self._algorithm == "SGD" else None
        of_group = [optimizer.state_tensors() for optimizer in optimizers]
        names = [of_group[group] for group in groups]
        # The state makes an entry for whatever it is asked by index.
        states: list[Any] = [self.state.get(p) for p in params]
        described, held = _as_before(found, states, names, counts is None), None
        put_in_order = described is None
        if described is None:
            places = zip(params, states, names, groups)
            states = [self._state(p, old or {}, own, self.param_groups[group]) for p, old, own, group in places]
            described, held = _aligned(found, states, names, counts is None)
        of_grads, of_written = described
        try:
            raw = _gradclip.step(clip, optimizers, groups, counts, of_written, of_grads)
        except NonFiniteError as error:
            raise _located(error, found) from None
        del held
        self.report = report(raw, found.names, found.places, self.clip.get("scope") or "global", repr(clip))
        if self.report.skipped is None:
            _memory.bump(params)
            for p, state in zip(params, states) if put_in_order else ():
                if state is not self.state.get(p) and state:
                    self.state[p].update(state)
        return loss

    def _found(self, grads: Iterable[Any] | None) -> tuple[Given, list[int]]:
        """The parameters that have gradients, with these, and the group of each."""
        # Not in pairs: thousands of new tuples would have Python look for garbage, which takes longer than the step.
        every = [p for group in self.param_groups for p in group["params"]]
        groups = [number for number, group in enumerate(self.param_groups) for _ in group["params"]]
        gradients = [p.grad for p in every] if grads is None else list(grads)
        if len(gradients) != len(every):
            raise ValueError(f"grads has {len(gradients)} entries, and there are {len(every)} parameters")
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        places = [i for i, gradient in enumerate(gradients) if gradient is not None]
        own = [names[i] for i in places] if len(names) == len(every) else None
        found = Given(own, [gradients[i] for i in places], places, [every[i] for i in places])
        return found, [groups[i] for i in places]

    def _state(self, p: Any, old: dict[str, Any], names: list[str], group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter for its next step: these tensors, and how many steps it has taken, unless that is
        not counted. What begins, or has another dtype, becomes the optimizer's once the step is taken."""
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        state = old
        for name in names:
            tensor = old.get(name)
            if tensor is None:
                first = group["initial_accumulator_value"] if name == "sum" else 0.0
                state = {**state, name: torch.full_like(p, first, dtype=wide, requires_grad=False)}
            elif tensor.dtype != wide:
                state = {**state, name: tensor.to(wide)}
        if self._algorithm == "SGD":
            return state
        step = old.get("step")
        if not isinstance(step, torch.Tensor) or step.dtype not in COUNTS:
            default = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            state = {**state, "step": torch.tensor(float(step or 0), dtype=default, device="cpu")}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this optimizer, or of PyTorch's own of this name, has returned."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, params):
            if p.dtype not in HALVES:
                continue
            # PyTorch has rounded its state to its dtype.
            for name, tensor in state_dict["state"].get(key, {}).items():
                loaded: Any = self.state[p].get(name)
                if isinstance(tensor, torch.Tensor) and tensor.dtype != loaded.dtype and name != "step":
                    # A hook may have changed it on the way.
                    if torch.equal(tensor.to(loaded), loaded):
                        self.state[p][name] = tensor.detach().clone()

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {**state, "clip": self.clip, "report": self.report}


def _check_device(tensor: Any, label: str) -> None:
    if tensor.device.type != "cpu":
        raise DeviceError(
            f"{label} is on {tensor.device}, and gradclip takes its steps on the CPU: move it there, or take torch.optim and"
            " gradclip.clip(..., device_fallback=True)"
        )


# What describes gradients, and what describes all that is written.
_Described = tuple[_memory.Flat, _memory.Flat]
# By the number of a parameter's dtype, that of its state.
_WIDE = bytes(_memory.CODES["float64" if name == "float64" else "float32"] for name in _memory.CODES).ljust(256, b"\0")


def _written(params: list[Any], states: list[dict[str, Any]], names: list[list[str]], counted: bool) -> list[Any]:
    """What a step writes: the parameters, then the tensors of each, and then all counts."""
    tensors = [state[name] for state, own in zip(states, names) for name in own]
    return [*params, *tensors, *(state["step"] for state in states)] if counted else [*params, *tensors]


def _as_before(found: Given, states: list[Any], names: list[list[str]], counted: bool) -> _Described | None:
    """The descriptions of gradients, and of parameters with their state, if the last step has left them all in order and
    all are plain. A step of many small tensors spends much of its time here, so each tensor is looked at once."""
    params = found.params or []
    try:
        written = _written(params, states, names, counted)
    except (KeyError, TypeError):
        # A parameter has no state yet.
        return None
    count = len(params)
    flat = _memory.plain([*found.tensors, *written], alike=count)
    if flat is None:
        return None
    addresses, lengths, dtypes, *_ = flat
    wide = dtypes[count : 2 * count].translate(_WIDE)
    kept = bytes([dtype for dtype, own in zip(wide, names) for _ in own])
    counts = dtypes[2 * count + len(kept) :]
    if not dtypes.startswith(kept, 2 * count) or not set(counts) <= {_memory.CODES["float32"], _memory.CODES["float64"]}:
        return None
    size = 8 * count
    of_grads = (addresses[:size], lengths[:size], dtypes[:count], None, found.names)
    return of_grads, (addresses[size:], lengths[size:], dtypes[count:], None, None)


def _aligned(
    found: Given, states: list[dict[str, Any]], names: list[list[str]], counted: bool
) -> tuple[_Described, Any]:
    """The descriptions of gradients, and of parameters with their state, all laid out as the parameters are; and what
    keeps their memory alive. Gradients and states with other layouts are copied."""
    params = found.params or []
    gradients = list(found.tensors)
    for i, p in enumerate(params):
        place, gradient = found.places[i], gradients[i]
        if not isinstance(gradient, torch.Tensor):
            raise TypeError(f"gradient {place} is a {type(gradient).__name__}; it must be a tensor")
        if gradient.shape != p.shape:
            raise ValueError(f"gradient {place} has shape {tuple(gradient.shape)}, its parameter {tuple(p.shape)}")
        label = found.label(i).replace("tensor", "parameter", 1)
        _check_device(p, label)
        _check_device(gradients[i], f"the gradient of {label}")
        if not _memory.hides_data(torch, p) and not _memory.is_dense(p.shape, p.stride()):
            raise ValueError(f"{label} has gaps between its elements, or shares them; make it .contiguous() first")
        if gradients[i].layout is torch.strided and gradients[i].stride() != p.stride():
            gradients[i] = torch.empty_like(p, dtype=gradients[i].dtype, requires_grad=False).copy_(gradients[i])
        for name in names[i]:
            tensor = states[i][name]
            if tensor.stride() != p.stride():
                copy = torch.empty_like(p, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
                states[i] = {**states[i], name: copy}

    def label_of(i: int) -> str:
        return found.label(i).replace("tensor", "parameter", 1) if i < len(params) else "a tensor of the state"

    def label_of_gradient(i: int) -> str:
        return f"the gradient of {label_of(i)}"

    of_grads = _memory.memory(gradients, label_of_gradient, found.names, write=False)
    written = _written(params, states, names, counted)
    of_written = _memory.memory(written, label_of, None, write=True, as_torch=True)
    return (of_grads.flat, of_written.flat), (of_grads, of_written)


class SGD(_Clipping, torch.optim.SGD):  # type: ignore[misc]
    """``torch.optim.SGD`` on the CPU, with a clip in the same pass.

    ``params``: parameters, or groups of them; float32, float64, float16 and bfloat16, of any shape. ``lr`` (1e-3), ``momentum``
    (0), ``dampening`` (0), ``weight_decay`` (0), ``nesterov``, ``maximize``: as in PyTorch. (Sutskever, Martens, Dahl, Hinton
    2013, "On the importance of initialization and momentum in deep learning")
    """

    _algorithm = "SGD"
    _settings = ("momentum", "dampening", "nesterov")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        settings: dict[str, Any] = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)
        settings.update(nesterov=nesterov, maximize=maximize)
        self._begin(clip, settings)
        super().__init__(params, **settings)


class Adagrad(_Clipping, torch.optim.Adagrad):  # type: ignore[misc]
    """``torch.optim.Adagrad`` on the CPU, with a clip in the same pass.

    ``params``: parameters, or groups of them; float32, float64, float16 and bfloat16, of any shape. ``lr`` (1e-2), ``lr_decay``
    (0), ``weight_decay`` (0), ``initial_accumulator_value`` (0), ``eps`` (1e-10), ``maximize``: as in PyTorch. (Duchi, Hazan,
    Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization")
    """

    _algorithm = "Adagrad"
    _settings = ("lr_decay", "initial_accumulator_value", "eps")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        settings: dict[str, Any] = dict(lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, eps=eps, maximize=maximize)
        settings["initial_accumulator_value"] = initial_accumulator_value
        self._begin(clip, settings)
        super().__init__(params, **settings)
        # PyTorch makes this state at once, in the parameter's dtype.
        for p, state in self.state.items():
            if p.dtype in HALVES:
                state["sum"] = torch.full_like(p, initial_accumulator_value, dtype=torch.float32, requires_grad=False)


class RMSprop(_Clipping, torch.optim.RMSprop):  # type: ignore[misc]
    """``torch.optim.RMSprop`` on the CPU, with a clip in the same pass.

    ``params``: parameters, or groups of them; float32, float64, float16 and bfloat16, of any shape. ``lr`` (1e-2), ``alpha``
    (0.99, below 1), ``eps`` (1e-8), ``weight_decay`` (0), ``momentum`` (0), ``centered``, ``maximize``: as in PyTorch.
    (Tieleman, Hinton 2012, lecture 6.5; centered: Graves 2013, "Generating sequences with recurrent neural networks")
    """

    _algorithm = "RMSprop"
    _settings = ("alpha", "eps", "momentum", "centered")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        settings: dict[str, Any] = dict(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        settings.update(centered=centered, maximize=maximize)
        self._begin(clip, settings)
        super().__init__(params, **settings)


class Adam(_Clipping, torch.optim.Adam):  # type: ignore[misc]
    """``torch.optim.Adam`` on the CPU, with a clip in the same pass.

    ``params``: parameters, or groups of them; float32, float64, float16 and bfloat16, of any shape. ``lr`` (1e-3), ``betas``
    (0.9, 0.999), ``eps`` (1e-8), ``weight_decay`` (0), ``amsgrad``, ``maximize``: as in PyTorch. (Kingma, Ba 2015, "Adam: a
    method for stochastic optimization"; amsgrad: Reddi, Kale, Kumar 2018, "On the convergence of Adam and beyond")
    """

    _algorithm = "Adam"
    _settings = ("betas", "eps", "amsgrad")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        settings: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings.update(amsgrad=amsgrad, maximize=maximize)
        self._begin(clip, settings)
        super().__init__(params, **settings)


class AdamW(_Clipping, torch.optim.AdamW):  # type: ignore[misc]
    """``torch.optim.AdamW`` on the CPU, with a clip in the same pass.

    ``params``: parameters, or groups of them; float32, float64, float16 and bfloat16, of any shape. ``lr`` (1e-3), ``betas``
    (0.9, 0.999), ``eps`` (1e-8), ``weight_decay`` (1e-2), ``amsgrad``, ``maximize``: as in PyTorch. (Loshchilov, Hutter 2019,
    "Decoupled weight decay regularization")
    """

    _algorithm = "AdamW"
    _settings = ("betas", "eps", "amsgrad")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        settings: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        settings.update(amsgrad=amsgrad, maximize=maximize)
        self._begin(clip, settings)
        super().__init__(params, **settings)


# What is the same for all.
_SHARED = """
    The clip, over the gradients of all groups together: at most one of ``max_norm``, ``max_rms``, ``max_average_norm``,
    ``clip_value`` and ``clip_range``, and with it ``norm_type``, ``scope`` (``"global"`` or ``"tensor"``), ``non_finite`` and
    ``skip_above``, as :func:`gradclip.clip` takes them. With max_norm a NaN is an error, unless ``non_finite`` chooses
    otherwise. Without any of them nothing is clipped, and non-finite gradients are only counted. They lie in the dict
    ``optimizer.clip``, and may change from step to step.

    ``optimizer.report`` is the :class:`gradclip.Report` of the last step. A skipped step changes nothing and does not
    count. Gradients are only read. ``foreach`` and ``fused`` are accepted and change nothing. ``state_dict()`` has PyTorch's
    form, which ``torch.optim`` loads, and the other way round; the state of half-precision parameters is float32. A
    ``torch.amp.GradScaler`` hands its scale over, so no ``unscale_`` is needed.

    Raises ValueError for a setting that is wrong, by its name; DeviceError for a parameter that is not on the CPU.
    """
for _class in (SGD, Adagrad, RMSprop, Adam, AdamW):
    _class.__doc__ = (_class.__doc__ or "").rstrip() + "\n" + _SHARED
