"""Gradients that are spread over the processes of a torch.distributed group.

Each process measures its own part. One all-gather sends the partials, of a fixed size, to every process, and each merges
them in the order of the ranks: so all get the same bits, and none waits for another if one of them fails before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradclip import _gradclip, _memory
from gradclip._gradclip import Clip, NonFiniteError
from gradclip._memory import Given, Memory
from gradclip._report import NonFinite, Raw

# What a process sends: whether it has failed, the length of its partial, and the partial.
SIZE = 1024
HEAD = 3


def local(tensor: Any) -> Any:
    """The part of this process, if it is a DTensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def counts(tensor: Any, label: str) -> bool:
    """Whether the norm counts this process's part of a tensor: if it is replicated, one process's part counts."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return True
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{label} is a DTensor of partial sums; redistribute it first")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    return all(at == 0 or not placement.is_replicate() for at, placement in zip(coordinate, placements))


def run(group: Any, prepare: Callable[[], tuple[Clip, Given]], write: bool) -> tuple[Clip, Given, Raw, NonFinite | None]:
    """Clip, or only measure. ``prepare`` may fail, in which case every process fails.

    Returns what it has prepared, the report, and the elements that are not finite.
    """
    import torch

    state: list[tuple[Clip, Given, Memory, list[Any]]] = []

    def measured() -> bytes:
        clip, found = prepare()
        with torch.no_grad():
            parts = [local(tensor) for tensor in found.tensors]
        counted = [counts(tensor, found.label(i)) for i, tensor in enumerate(found.tensors)]
        memory = _memory.memory(parts, found.label, None, write=write, as_torch=True)
        state.append((clip, found, memory, parts))
        return _gradclip.partial(clip, memory.flat, counted)

    partials = _exchanged(torch, group, measured)
    clip, found, memory, parts = state[0]
    try:
        raw, written, rank, _ = _gradclip.finish(clip, partials, memory.flat if write else None)
    except NonFiniteError as error:
        count, tensor, index, _, rank = error.raw
        error.non_finite = _located(found, (count, tensor, index), rank, group)
        error.args = (f"{error.non_finite}; nothing was written",)
        raise
    if write:
        _memory.finish(memory, parts, written)
        hidden = [tensor for tensor in found.tensors if hasattr(tensor, "to_local")]
        if hidden and written != []:
            _memory.bump(hidden)
    bad = raw[4]
    return clip, found, raw, None if bad is None or rank is None else _located(found, bad, rank, group)


def _located(found: Given, bad: tuple[int, int, int], rank: int, group: Any) -> NonFinite:
    import torch

    count, tensor, index = bad
    # Another process's list may be another.
    if torch.distributed.get_rank(group) != rank:
        return NonFinite(count, tensor, None, index, rank)
    return NonFinite(count, found.places[tensor], found.names[tensor] if found.names else None, index, rank)


def _exchanged(torch: Any, group: Any, measured: Callable[[], bytes]) -> list[bytes]:
    """The partials of all processes, in the order of their ranks."""
    distributed = torch.distributed
    try:
        if distributed.get_rank(group) < 0:
            raise ValueError("this process is not in the group")
    except (AttributeError, TypeError) as error:
        raise TypeError(f"group must be a torch.distributed process group, not {group!r}") from error
    failure: Exception | None = None
    own = b""
    try:
        own = measured()
    except Exception as error:
        failure = error
    message = bytes([failure is not None]) + len(own).to_bytes(HEAD - 1, "little") + own
    sent = torch.frombuffer(bytearray(message.ljust(SIZE, b"\0")), dtype=torch.uint8)
    received = [torch.empty_like(sent) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(received, sent, group=group)
    if failure is not None:
        raise failure
    messages = [bytes(one.tolist()) for one in received]
    for rank, message in enumerate(messages):
        if message[0]:
            raise RuntimeError(f"rank {rank} of the group failed, and reports the reason itself; nothing was written")
    return [one[HEAD : HEAD + int.from_bytes(one[1:HEAD], "little")] for one in messages]
