"""What was given, as the Rust part takes it: addresses, numbers of elements and dtypes.

Neither PyTorch nor NumPy is imported here, unless something else than their tensors and arrays has to be converted.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gradclip import _gradclip
from gradclip._gradclip import DeviceError

# The Rust part's numbers for dtypes, by the end of their names.
CODES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}

Flat = tuple[bytes, bytes, bytes, "list[tuple[int, ...]] | None", "list[str] | None"]


class Given(NamedTuple):
    """Tensors with their names, as they were given. Those that are None are left out."""

    names: list[str] | None
    tensors: list[Any]
    # The place of each in the list that was given.
    places: list[int]
    # Of a module: the parameters.
    params: list[Any] | None

    def label(self, i: int) -> str:
        return f"tensor {self.names[i]!r}" if self.names else f"tensor {self.places[i]}"

    def only(self, keep: list[bool]) -> Given:
        """Those of these places in the list."""

        def kept(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [value for value, keeps in zip(values, keep) if keeps]

        return Given(kept(self.names), kept(self.tensors) or [], kept(self.places) or [], kept(self.params))


class Memory(NamedTuple):
    """The description of tensors, with what keeps their memory alive."""

    flat: Flat
    # What the addresses belong to: the tensor itself, or a copy of it.
    held: list[Any]
    # By place, how to write a copy back.
    back: dict[int, Callable[[], Any]]


def given(tensors: Any, argument: str = "tensors") -> Given:
    """A tensor, an iterable of tensors, a dict by name, or a torch.nn.Module, whose parameters' gradients are taken."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensors, torch.nn.Module):
        with_grad = {name: p for name, p in tensors.named_parameters() if p.grad is not None}
        params, grads = [p.detach() for p in with_grad.values()], [p.grad for p in with_grad.values()]
        return Given(list(with_grad), grads, list(range(len(params))), params)
    if isinstance(tensors, Mapping):
        for name in tensors:
            if not isinstance(name, str):
                raise TypeError(f"{argument} has a key of type {type(name).__name__}; names must be str")
        named, every = list(tensors), list(tensors.values())
        places = [i for i, tensor in enumerate(every) if tensor is not None]
        return Given([named[i] for i in places], [every[i] for i in places], places, None)
    if hasattr(tensors, "read"):
        raise TypeError(f"{argument} is an open or closed file; give its path to gradclip.norm or gradclip.clip_file")
    if is_array(tensors):
        return Given(None, [tensors], [0], None)
    if isinstance(tensors, (str, bytes, bytearray)) or not isinstance(tensors, Iterable):
        raise TypeError(
            f"{argument} is {_a(tensors)}; it must be a tensor, an iterable of tensors, a dict by name or a torch.nn.Module"
        )
    every = list(tensors)
    places = [i for i, tensor in enumerate(every) if tensor is not None]
    return Given(None, [every[i] for i in places], places, None)


def is_array(value: Any) -> bool:
    """Whether it is a tensor or an array, of whatever library."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return True
    return hasattr(value, "__array_interface__") or hasattr(value, "__array__") or hasattr(value, "__dlpack__")


def memory(
    tensors: list[Any],
    label: Callable[[int], str],
    names: list[str] | None,
    *,
    write: bool,
    shaped: bool = False,
    as_torch: bool = False,
) -> Memory:
    """Describe tensors. `shaped`: in row-major order, with shapes. What is not laid out as needed is copied. `as_torch`:
    gradients that require grad themselves may be written, as PyTorch's own clips do."""
    if not shaped and "torch" in sys.modules:
        flat = plain(tensors, names)
        if flat is not None and (as_torch or not (write and True in {t.requires_grad for t in tensors})):
            return Memory(flat, tensors, {})
    addresses, lengths, codes, shapes = array("Q"), array("Q"), bytearray(), []
    held: list[Any] = []
    back: dict[int, Callable[[], Any]] = {}
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    for i, tensor in enumerate(tensors):
        if torch is not None and isinstance(tensor, torch.Tensor):
            one = _of_torch(torch, tensor, label(i), write, shaped, as_torch)
        elif numpy is not None and isinstance(tensor, (numpy.ndarray, numpy.generic)):
            one = _of_numpy(numpy, tensor, label(i), write, shaped)
        elif write or not is_array(tensor):
            raise _not_an_array(tensor, label(i), write)
        else:
            one = _of_numpy(*_as_numpy(tensor, label(i)), label(i), write, shaped)
        addresses.append(one.address)
        lengths.append(one.length)
        codes.append(one.code)
        shapes.append(one.shape)
        held.append(one.held)
        if one.back is not None:
            back[i] = one.back
    flat = (addresses.tobytes(), lengths.tobytes(), bytes(codes), shapes if shaped else None, names)
    return Memory(flat, held, back)


_torch_codes: dict[Any, int] = {}
_torch_plain: frozenset[type] = frozenset()


def torch_codes(torch: Any) -> dict[Any, int]:
    """The number of each dtype that can be clipped."""
    global _torch_plain
    if not _torch_codes:
        _torch_codes.update({getattr(torch, name): code for name, code in CODES.items()})
        _torch_plain = frozenset([torch.Tensor, torch.nn.Parameter])
    return _torch_codes


def plain(tensors: list[Any], names: list[str] | None = None, alike: int = 0) -> Flat | None:
    """The description of tensors that are all plain: PyTorch's own class, on the CPU, contiguous, of a known dtype. Each
    of the first `alike` tensors must have the shape of the one that stands `alike` places behind it.

    A call on many small tensors spends most of its time here. So newer PyTorch is asked in one call, and older for as
    little as possible.
    """
    torch = sys.modules["torch"]
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is not None:
        flat = _gradclip.plain(tensors, (torch.Tensor, torch.nn.Parameter), exchange, alike)
        return None if flat is None else (*flat, None, names)
    codes = torch_codes(torch)
    try:
        if not {type(t) for t in tensors} <= _torch_plain:
            return None
        if False in {t.is_cpu for t in tensors} or False in {t.is_contiguous() for t in tensors}:
            return None
        if any(a.shape != b.shape for a, b in zip(tensors[:alike], tensors[alike:])):
            return None
        dtypes = bytes([codes[t.dtype] for t in tensors])
        addresses = array("Q", [t.data_ptr() for t in tensors])
        lengths = array("Q", [t.numel() for t in tensors])
        # A view that negates what is stored, as that of an imaginary part can; of more elements it has gaps.
        if 1 in lengths and any(t.is_neg() for t, length in zip(tensors, lengths) if length == 1):
            return None
    except (KeyError, RuntimeError):
        # Another dtype; or a sparse tensor, which has no address.
        return None
    return addresses.tobytes(), lengths.tobytes(), dtypes, None, names


class _One(NamedTuple):
    address: int
    length: int
    code: int
    shape: tuple[int, ...]
    held: Any
    back: Callable[[], Any] | None = None


def hides_data(torch: Any, tensor: Any) -> bool:
    """Whether its class answers PyTorch's operations by itself, as DTensor and FakeTensor do."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _of_torch(torch: Any, tensor: Any, label: str, write: bool, shaped: bool, as_torch: bool) -> _One:
    if hides_data(torch, tensor):
        kind = type(tensor).__name__
        what = "; give group=, the processes that hold its parts" if kind == "DTensor" else ""
        raise TypeError(f"{label} is a {kind}, whose data lies elsewhere{what}")
    if tensor.device.type == "meta":
        raise TypeError(f"{label} is a meta tensor, which has no data")
    if tensor.device.type != "cpu":
        raise DeviceError(
            f"{label} is on {tensor.device}, and gradclip computes on the CPU: move it there, or let PyTorch clip it"
            " where it is, with device_fallback=True"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{label} is sparse ({tensor.layout}); convert it with .to_dense()")
    code = torch_codes(torch).get(tensor.dtype)
    if code is None:
        raise _wrong_dtype(label, str(tensor.dtype))
    if write and tensor.requires_grad and not as_torch:
        raise ValueError(f"{label} requires grad: is it a parameter? Give its gradient (.grad), or .detach() it")
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    negated = tensor.is_neg()
    if not negated and (tensor.is_contiguous() or (not shaped and is_dense(shape, strides))):
        try:
            return _One(tensor.data_ptr(), tensor.numel(), code, shape, tensor)
        except RuntimeError as error:
            raise TypeError(f"{label} has no memory of its own: {error}") from error
    if write and may_overlap(shape, strides):
        raise ValueError(f"{label} has elements that share memory (is it expanded?); make it .contiguous() first")
    copy = tensor.detach().resolve_neg().contiguous()

    def back() -> None:
        with torch.no_grad():
            tensor.copy_(copy)

    return _One(copy.data_ptr(), copy.numel(), code, shape, copy, back if write else None)


def _of_numpy(numpy: Any, value: Any, label: str, write: bool, shaped: bool) -> _One:
    if write and not isinstance(value, numpy.ndarray):
        raise _not_an_array(value, label, write)
    if isinstance(value, numpy.ma.MaskedArray):
        raise TypeError(f"{label} is a masked array; fill it or give its .data")
    code = CODES.get(value.dtype.name)
    if code is None:
        raise _wrong_dtype(label, value.dtype.name)
    if not value.dtype.isnative:
        raise ValueError(f"{label} has another byte order than this machine; convert it with .astype({value.dtype.name!r})")
    tensor = numpy.asarray(value)
    if write and not tensor.flags.writeable:
        raise ValueError(f"{label} is read-only; give a copy")
    size = tensor.itemsize
    strides = tuple(stride // size for stride in tensor.strides)
    whole = all(stride % size == 0 for stride in tensor.strides)
    if tensor.flags.c_contiguous or (whole and not shaped and is_dense(tensor.shape, strides)):
        return _One(tensor.__array_interface__["data"][0], tensor.size, code, tensor.shape, tensor)
    if write and (not whole or may_overlap(tensor.shape, strides)):
        raise ValueError(f"{label} has elements that share memory (is it broadcast?); copy it first")
    copy = numpy.ascontiguousarray(tensor)

    def back() -> None:
        tensor[...] = copy

    address = copy.__array_interface__["data"][0]
    return _One(address, copy.size, code, tensor.shape, copy, back if write else None)


def _as_numpy(value: Any, label: str) -> tuple[Any, Any]:
    import numpy

    try:
        return numpy, numpy.asarray(value)
    except Exception as error:
        raise TypeError(f"{label} is {_a(value)}, of which NumPy makes no array: {error}") from error


def is_dense(shape: Iterable[int], strides: Iterable[int]) -> bool:
    """Whether the elements fill a range without gaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides) if size != 1):
        if stride != expected:
            return 0 in shape
        expected *= size
    return True


def may_overlap(shape: Iterable[int], strides: Iterable[int]) -> bool:
    """Whether two elements may share memory."""
    if 0 in shape:
        return False
    end = 0
    for stride, size in sorted((abs(stride), size) for size, stride in zip(shape, strides) if size != 1):
        if stride <= end:
            return True
        end += stride * (size - 1)
    return False


def finish(memory: Memory, tensors: list[Any], written: list[int] | None) -> None:
    """After a clip: write copies back, and tell autograd what was written. None: all."""
    if written is None:
        if not memory.back:
            return bump(tensors)
        written = list(range(len(tensors)))
    bump([tensors[i] for i in written if i not in memory.back])
    for i in written:
        if i in memory.back:
            memory.back[i]()
    return None


def bump(tensors: list[Any]) -> None:
    """Tell PyTorch that these tensors were written, so that autograd refuses what it had saved of them."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    of_torch = tensors
    # Types are few, and looking at each tensor would take a tenth of the time of a clip of small ones.
    if not all(issubclass(kind, torch.Tensor) for kind in set(map(type, tensors))):
        of_torch = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if not of_torch:
        return
    try:
        torch.autograd.graph.increment_version(of_torch)
        return
    except (AttributeError, TypeError):
        # Before PyTorch 2.5 it takes one tensor, and before 2.1 there is none.
        one_by_one = getattr(torch.autograd.graph, "increment_version", None)
    with torch.no_grad():
        for tensor in of_torch:
            if tensor.is_inference():
                continue
            if one_by_one is not None:
                one_by_one(tensor)
            else:
                # A view shares the counter. This one has no elements.
                tensor.as_strided((0,), (1,)).zero_()


def _a(value: Any) -> str:
    name = type(value).__name__
    return ("an " if name[:1].lower() in "aeiou" else "a ") + name


def _wrong_dtype(label: str, dtype: str) -> TypeError:
    hint = "; give torch.view_as_real(tensor)" if "complex" in dtype and "torch" in dtype else ""
    known = "float32, float64, float16 and bfloat16 can be measured and clipped"
    return TypeError(f"{label} is {dtype.removeprefix('torch.')}; {known}{hint}")


def _not_an_array(value: Any, label: str, write: bool) -> TypeError:
    if write and is_array(value):
        return TypeError(
            f"{label} is {_a(value)}; only PyTorch tensors and NumPy arrays can be clipped in place."
            " Its norm can be measured; clip a NumPy copy of it"
        )
    return TypeError(f"{label} is {_a(value)}; it must be a PyTorch tensor or an array like NumPy's")


def zeros_of_example(tensor: Any) -> Any:
    """Zeros of the shape of an example, which dimension 0 counts: float64 for float64, else float32."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return torch.zeros(tensor.shape[1:], dtype=dtype, device="cpu")
    import numpy

    return numpy.zeros(tensor.shape[1:], numpy.float64 if tensor.dtype == numpy.float64 else numpy.float32)
