"""What a clip reports."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

RawSegments = tuple[bytes, bytes, bytes, bytes, bytes]
Raw = tuple[
    float, float, bool, int, "tuple[int, int, int] | None", "tuple[int, int] | None", "str | None", "RawSegments | None"
]


class NonFinite(NamedTuple):
    """The NaN and infinite elements: how many there are, and where the first one is."""

    #: How many there are in all tensors.
    count: int  # type: ignore[assignment]
    #: The first tensor that holds one: its place in the list that was given.
    tensor: int
    #: That tensor's name, if it has one.
    name: str | None
    #: The first such element in that tensor, counted from 0 in memory order.
    index: int  # type: ignore[assignment]
    #: The process of a group that holds it; None outside a group.
    rank: int | None = None

    def __str__(self) -> str:
        of = f"tensor {self.tensor}" if self.name is None else f"tensor {self.name!r}"
        on = "" if self.rank is None else f" on rank {self.rank}"
        return f"{self.count} non-finite element{'s' * (self.count != 1)}, the first at index {self.index} of {of}{on}"


class Lost(NamedTuple):
    """How many elements rounding to the stored dtype has lost."""

    #: How many were not 0 and became 0.
    zero: int
    #: How many were finite and became infinite.
    infinite: int


class Segment(NamedTuple):
    """The elements that share a norm and a coefficient: a tensor, a unit or an example."""

    #: The tensor's name, with the unit or example: ``w``, ``w[3]``, ``w example 3``, ``example 3``.
    name: str
    #: The place of the tensor in the list that was given; None for an example over all tensors.
    tensor: int | None
    #: The number of the unit or example; None for a whole tensor.
    index: int | None  # type: ignore[assignment]
    norm: float
    clip_coef: float
    clipped: bool


class Report(NamedTuple):
    """The outcome of a clip, or of a measurement. ``float(report)`` is the total norm."""

    #: The norm over all gradients, divided by ``grad_scale``. NaN or infinite if a gradient is; NaN for a value clip.
    total_norm: float
    #: The factor that gradients were multiplied by, beside ``1 / grad_scale``: the smallest of all segments.
    clip_coef: float
    #: Whether there was anything to clip.
    clipped: bool
    #: How many elements were measured.
    elements: int
    #: How many tensors there were.
    tensors: int
    #: The NaN and infinite elements, if there were any.
    non_finite: NonFinite | None
    #: What rounding has lost; None after a measurement.
    lost: Lost | None
    #: Why the step must not be taken: ``"non-finite"`` or ``"above"``. None if the gradients are to be used.
    skipped: str | None
    #: The clip, in one line.
    description: str
    #: Each segment of a scope other than ``"global"``, by tensor, then by unit or example.
    segments: list[Segment]
    #: The report of each group, by its pattern; ``""`` is what no group took.
    groups: dict[str, Report]

    def __float__(self) -> float:
        return self.total_norm

    @property
    def num_clipped(self) -> int:
        """How many segments were clipped."""
        return sum(segment.clipped for segment in self.segments)

    def to_dict(self, prefix: str = "") -> dict[str, float]:
        """Flat numbers for a logger, each name after ``prefix``.

        ``total_norm``, ``clip_coef``, ``clipped``, ``elements``, ``non_finite`` (how many) and ``skipped``; under a scope by
        tensor ``norm/NAME`` for each tensor, and with groups ``norm/PATTERN`` for each group.
        """
        found: dict[str, float] = {
            "total_norm": self.total_norm,
            "clip_coef": self.clip_coef,
            "clipped": int(self.clipped),
            "elements": self.elements,
            "non_finite": self.non_finite.count if self.non_finite else 0,
            "skipped": int(self.skipped is not None),
        }
        found.update({f"norm/{s.name}": s.norm for s in self.segments if s.index is None})
        found.update({f"norm/{pattern or 'rest'}": group.total_norm for pattern, group in self.groups.items()})
        return {prefix + name: value for name, value in found.items()}

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "total_norm", f"{self.total_norm:.9g}"
        yield "clip_coef", f"{self.clip_coef:.9g}"
        yield "clipped", str(self.clipped)
        yield "elements", f"{self.elements:,}"
        yield "tensors", f"{self.tensors:,}"
        for name in ("non_finite", "lost", "skipped"):
            value = getattr(self, name)
            if value is not None and value != Lost(0, 0):
                yield name, str(value)
        if self.segments:
            yield "num_clipped", f"{self.num_clipped:,} of {len(self.segments):,} segments"
        for pattern, group in self.groups.items():
            yield f"group {pattern or '(rest)'}", f"norm {group.total_norm:.6g} times {group.clip_coef:.6g}"

    def __repr__(self) -> str:
        return "Report(" + ", ".join(f"{name}={value}" for name, value in self._rows()) + ")"

    def _repr_html_(self) -> str:
        import html

        rows = list(self._rows())
        largest = sorted(self.segments, key=lambda s: -s.norm if s.norm == s.norm else float("-inf"))[:10]
        rows += [(s.name, f"norm {s.norm:.6g} times {s.clip_coef:.6g}") for s in largest]
        cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        return f"<table><caption>{html.escape(self.description)}</caption>{cells}</table>"


class Mismatch(NamedTuple):
    """An element on which GPU and CPU disagree."""

    tensor: int
    name: str | None
    index: int  # type: ignore[assignment]
    cpu: float
    gpu: float
    #: Their distance in units of the last place.
    ulps: int


class Verification(NamedTuple):
    """How a clip on the GPU compares with the same clip on the CPU. It is true if everything agrees."""

    agrees: bool
    #: The largest relative difference of the norms, and the largest that is tolerated.
    norm_error: float
    norm_tolerance: float
    #: Whether both clipped the same segments.
    same_decision: bool
    #: The largest distance of two elements, in units of the last place.
    worst_ulps: int
    first_mismatch: Mismatch | None
    elements: int

    def __bool__(self) -> bool:
        return self.agrees


def report(
    raw: Raw, names: list[str] | None, places: list[int], scope: str, description: str, elements_of: int | None = None
) -> Report:
    """A report of what the Rust part tells. `places`: of each tensor, in the list that was given."""
    total_norm, clip_coef, clipped, elements, found, lost, skipped, segments = raw
    return Report(
        total_norm,
        clip_coef,
        clipped,
        elements,
        len(places) if elements_of is None else elements_of,
        None if found is None else non_finite(found, names, places),
        None if lost is None else Lost(*lost),
        skipped,
        description,
        [] if segments is None else _segments(segments, names, places, scope),
        {},
    )


def non_finite(found: tuple[int, int, int], names: list[str] | None, places: list[int]) -> NonFinite:
    count, tensor, index = found
    return NonFinite(count, places[tensor], names[tensor] if names else None, index)


def _segments(raw: RawSegments, names: list[str] | None, places: list[int], scope: str) -> list[Segment]:
    tensors, indices = array("q", raw[0]), array("q", raw[1])
    norms, coefs = array("d", raw[2]), array("d", raw[3])
    found = []
    for tensor, index, norm, coef, clipped in zip(tensors, indices, norms, coefs, raw[4]):
        name = "" if tensor < 0 else names[tensor] if names else str(places[tensor])
        if index >= 0:
            name = f"{name}[{index}]" if scope == "unit" else f"{name} example {index}".lstrip()
        place = None if tensor < 0 else places[tensor]
        found.append(Segment(name, place, None if index < 0 else index, norm, coef, bool(clipped)))
    return found


def total_of(norms: list[float], p: float) -> float:
    """The p-norm of everything, from the p-norms of parts."""
    if any(norm != norm for norm in norms):
        return float("nan")
    largest = max(norms, default=0.0)
    if largest in (0.0, float("inf")) or p == float("inf"):
        return largest
    return float(largest * sum((norm / largest) ** p for norm in norms) ** (1 / p))
