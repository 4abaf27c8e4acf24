"""Tensors on another device than the CPU, by PyTorch's own operations there, with the same report.

A norm is float32 (float64 for float64 tensors) and merged in float64. The device is waited for once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gradclip._gradclip import NonFiniteError
from gradclip._memory import Given, hides_data, torch_codes
from gradclip._report import NonFinite, Report, Segment, total_of
from gradclip._settings import description, measuring, mode_of, number

USABLE = ("max_norm", "clip_value", "norm_type", "scope", "eps", "grad_scale", "non_finite", "report_norm")


def needed(tensors: list[Any]) -> bool:
    """Whether a tensor is on another device."""
    torch = sys.modules.get("torch")
    return torch is not None and any(isinstance(t, torch.Tensor) and t.device.type not in ("cpu", "meta") for t in tensors)


def clip(found: Given, settings: Mapping[str, Any], measure: bool = False) -> Report:
    """Clip in place, or only measure."""
    import torch

    for name, value in settings.items():
        if value is not None and name not in USABLE:
            raise ValueError(f"{name} cannot be used with device_fallback: move the tensors to the CPU")
    for i, tensor in enumerate(found.tensors):
        if not isinstance(tensor, torch.Tensor) or hides_data(torch, tensor) or tensor.dtype not in torch_codes(torch):
            raise TypeError(f"{found.label(i)} is a {type(tensor).__name__} that device_fallback cannot clip")
    # Also checks the settings.
    line = repr(measuring(settings) if measure else description(settings))
    mode = "max_norm" if measure else mode_of(settings)
    by_tensor = settings.get("scope") == "tensor"
    if settings.get("scope") not in (None, "global", "tensor"):
        raise ValueError(f"scope {settings['scope']!r} cannot be used with device_fallback: move the tensors to the CPU")
    given = settings.get("norm_type")
    p = 2.0 if given is None else number("norm_type", given)
    scale = number("grad_scale", settings.get("grad_scale") or 1.0)
    policy = settings.get("non_finite") or ("propagate" if measure or mode == "clip_value" else "error")
    if policy in ("zero", "drop"):
        raise ValueError(f"non_finite {policy!r} cannot be used with device_fallback: move the tensors to the CPU")
    with torch.no_grad():
        norms = _norms(torch, found.tensors, p)
        bad = _non_finite(torch, found, norms)
        elements = sum(t.numel() for t in found.tensors)
        if bad is not None and policy == "error":
            error = NonFiniteError(f"{bad}; nothing was written")
            error.non_finite = bad
            raise error
        norms = [norm / scale for norm in norms]
        total = total_of(norms, p)
        skipped = "non-finite" if bad is not None and policy == "skip" else None
        if mode == "clip_value":
            bound = number("clip_value", settings["clip_value"])
            largest = max((float(t.abs().max()) for t in found.tensors if t.numel()), default=0.0)
            outside = largest / scale > bound
            if skipped is None and (outside or scale != 1.0 or largest != largest):
                for tensor in found.tensors:
                    if scale != 1.0:
                        tensor.div_(scale)
                    tensor.clamp_(-bound, bound)
            reported = total if settings.get("report_norm") else float("nan")
            return _report(found, reported, [], outside and skipped is None, elements, bad, skipped, line)
        limit = float("inf") if settings.get("max_norm") is None else number("max_norm", settings["max_norm"])
        eps = 1e-6 if settings.get("eps") is None else number("eps", settings["eps"])
        coefs = [_coefficient(norm, limit, eps) for norm in (norms if by_tensor else [total] * len(norms))]
        if skipped is not None or measure:
            coefs = [1.0] * len(coefs) if skipped is not None else coefs
        else:
            for tensor, coef in zip(found.tensors, coefs):
                if coef / scale != 1.0:
                    tensor.mul_(coef / scale)
    names = found.names or [str(place) for place in found.places]
    segments = [
        Segment(name, place, None, norm, coef, coef != 1.0)
        for name, place, norm, coef in zip(names, found.places, norms, coefs)
    ]
    clipped = any(coef != 1.0 for coef in coefs)
    return _report(found, total, coefs, clipped, elements, bad, skipped, line, segments if by_tensor else [])


def _report(
    found: Given,
    total: float,
    coefs: list[float],
    clipped: bool,
    elements: int,
    bad: NonFinite | None,
    skipped: str | None,
    line: str,
    segments: list[Segment] | None = None,
) -> Report:
    coef = float("nan") if any(c != c for c in coefs) else min(coefs, default=1.0)
    return Report(total, coef, clipped, elements, len(found.tensors), bad, None, skipped, line, segments or [], {})


def _coefficient(norm: float, limit: float, eps: float) -> float:
    if norm != norm or (norm == limit == float("inf")):
        return float("nan")
    return limit / (norm + eps) if norm + eps > limit else 1.0


def _norms(torch: Any, tensors: list[Any], p: float) -> list[float]:
    """The norm of each tensor, with one wait for each device and dtype."""
    norms = [0.0] * len(tensors)
    alike: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    for (_, dtype), places in alike.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        measured = torch.stack([torch.linalg.vector_norm(tensors[i], p, dtype=wide) for i in places])
        for i, norm in zip(places, measured.tolist()):
            if norm == float("inf") or norm == 0.0:
                # Finite elements can have squares that float32 does not hold.
                largest = float(tensors[i].abs().max())
                if 0.0 < largest < float("inf"):
                    norm = float(torch.linalg.vector_norm(tensors[i].to(wide) / largest, p)) * largest
            norms[i] = norm
    return norms


def _non_finite(torch: Any, found: Given, norms: list[float]) -> NonFinite | None:
    count, first = 0, None
    for i, (tensor, norm) in enumerate(zip(found.tensors, norms)):
        if norm - norm == 0.0:
            continue
        places = (~torch.isfinite(tensor)).flatten().nonzero().flatten()
        count += len(places)
        if first is None and len(places):
            first = (found.places[i], found.names[i] if found.names else None, int(places[0]))
    return None if first is None else NonFinite(count, *first)
