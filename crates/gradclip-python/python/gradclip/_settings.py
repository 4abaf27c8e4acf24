"""The settings of a clip, as keyword arguments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from gradclip._gradclip import Clip

Scope = Literal["global", "tensor", "unit", "example", "example-tensor"]
Policy = Literal["error", "propagate", "skip", "zero", "drop"]
UnitAxis = Literal["first", "last", "optax"] | int | Sequence[int] | tuple[Literal["over"], Sequence[int]]

# The modes: the argument, and the Rust part's word.
MODES = {
    "max_norm": "norm",
    "max_rms": "rms",
    "max_average_norm": "average_norm",
    "agc": "agc",
    "clip_value": "value",
    "clip_range": "value",
}
# What describes a clip beside its mode.
OTHERS = ("norm_type", "scope", "unit_axis", "budget", "eps", "agc_eps", "grad_scale", "non_finite", "skip_above", "report_norm")


class Settings(TypedDict, total=False):
    """What describes a clip: one of the first six, the modes, and what goes with it."""

    max_norm: float | None
    max_rms: float | None
    max_average_norm: float | None
    agc: float | None
    clip_value: float | None
    clip_range: tuple[float, float] | None
    norm_type: float | str | None
    scope: Scope | None
    unit_axis: UnitAxis | None
    budget: Literal["each", "uniform", "sized"] | None
    eps: float | None
    agc_eps: float | None
    grad_scale: float
    non_finite: Policy | None
    skip_above: float | None
    report_norm: bool


def mode_of(settings: Mapping[str, Any]) -> str:
    """The argument that chooses the mode."""
    unknown = [name for name in settings if name not in MODES and name not in OTHERS]
    if unknown:
        raise TypeError(f"there is no argument {unknown[0]!r}")
    modes = [name for name in MODES if settings.get(name) is not None]
    if len(modes) != 1:
        what = "one of them is" if not modes else f"{' and '.join(modes)} exclude each other: one is"
        raise ValueError(f"{', '.join(MODES)}: {what} needed")
    return modes[0]


def description(settings: Mapping[str, Any], threshold: float | None = None) -> Clip:
    """The clip that the settings describe, with another threshold if there is one."""
    mode = mode_of(settings)
    others = {name: settings[name] for name in OTHERS if settings.get(name) is not None}
    if "norm_type" in others:
        others["norm_type"] = number("norm_type", others["norm_type"])
    for name in ("eps", "agc_eps", "grad_scale", "skip_above"):
        if name in others:
            others[name] = number(name, others[name])
    least = 0.0
    if mode == "clip_range" and threshold is None:
        try:
            least, most = settings[mode]
        except (TypeError, ValueError):
            raise TypeError(f"clip_range must be two numbers, the least and the largest, not {settings[mode]!r}") from None
        least, most = number(mode, least), number(mode, most)
    else:
        most = number(mode, settings[mode] if threshold is None else threshold)
        least = -most
    return Clip(MODES[mode], most, least, **others)


def number(argument: str, value: Any) -> float:
    """A float, from a number, a text like "inf", or a tensor of one element."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument} must be a number, not {value!r}") from None


def measuring(settings: Mapping[str, Any]) -> Clip:
    """The clip that measures the same norm and changes nothing."""
    changed = dict(settings)
    modes = [name for name in MODES if changed.get(name) is not None]
    if not modes:
        changed["max_norm"] = math.inf
    if changed.get("non_finite") is None:
        changed["non_finite"] = "propagate"
    return description(changed)


def fits(pattern: str) -> Callable[[str], bool]:
    """Whether a name fits the pattern, in which * stands for any characters, or none, and ? for one."""
    parts = {"*": ".*", "?": "."}
    compiled = re.compile("".join(parts.get(c, re.escape(c)) for c in pattern), re.DOTALL)
    return lambda name: compiled.fullmatch(name) is not None
