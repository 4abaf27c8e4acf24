"""gradclip's CPU path beside PyTorch, Optax and the machine's own limits. `scripts/bench-cpu.sh` runs this.

How it measures:

- One process, one set of arrays: within a round each contender runs once on the very same memory, and the order turns
  round from one round to the next. A ratio is the median over the rounds of the ratio within a round, because the speed
  of a shared machine swings far more from minute to minute than contenders differ.
- Every answer that is timed is checked. Ours against the norm that numpy finds in float64; a peer's own error is told.
- Arguments are ready before the clock starts: lists of pointers, parameters that hold gradients, scalars on the device.
- In-place clips stay clips: each one leaves three quarters of the norm that it finds.
- Contenders bring thread pools of their own, and some of those spin for a while after a call. So each turn begins with
  a pause, and where a set may lie in a cache then comes an untimed call, which brings threads and data back.
"""

import argparse
import ctypes
import functools
import gc
import importlib.metadata
import math
import os
import pathlib
import platform
import re
import statistics
import sys
import time

parser = argparse.ArgumentParser(description="the CPU path beside PyTorch, Optax and the machine's limits")
parser.add_argument("--library", type=pathlib.Path, required=True, help="the built shared library of gradclip-peers")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--quick", action="store_true", help="small arrays and few rounds")
parser.add_argument("--records", type=pathlib.Path, help="the folder whose record of this day and machine is added to")
ARGS = parser.parse_args()

# Before the peers are loaded, because their pools are as large as they find the machine then.
CORES = sorted(os.sched_getaffinity(0))[: ARGS.threads]
os.sched_setaffinity(0, CORES)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(ARGS.threads)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from report import cpu_info, memory_gib, record, run, say, table  # noqa: E402
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm  # noqa: E402

torch.set_num_threads(ARGS.threads)

MI = 1 << 20
LARGE = (4 if ARGS.quick else 128) * MI
ROUNDS, SMALL_ROUNDS = (3, 5) if ARGS.quick else (15, 31)
# Sets up to here may lie in a cache.
CACHED_BYTES = 64 * MI
PAUSE_S = 0.02
# What one in-place clip leaves of the norm.
KEEP = 0.75
OURS = "gradclip"
# PyTorch's own choice, foreach=None, is one of these.
TORCH = {False: "PyTorch", True: "PyTorch, foreach"}
OURS_ERROR = 1e-7
# How far a peer's norm, and what it clipped by it, may be off, relatively. Of 128 Mi normals PyTorch's norm was found
# to be off by 1.4e-2 in float32 and by 9.6e-2 in float16.
PEER_TOLERANCE = {torch.float32: 3e-2, torch.bfloat16: 5e-2, torch.float16: 2e-1}
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in PEER_TOLERANCE}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# ---- ours ----


class View(ctypes.Structure):
    """A twin of `View` in src/lib.rs."""

    _fields_ = [("data", ctypes.c_void_p), ("len", ctypes.c_size_t), ("dtype", ctypes.c_uint32)]


class Answer(ctypes.Structure):
    """A twin of `Answer` in src/lib.rs."""

    _fields_ = [("total_norm", ctypes.c_double), ("clipped", ctypes.c_uint32)]


LIBRARY = ctypes.CDLL(str(ARGS.library.resolve()))
U32, SIZE, PTR, F64 = ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_double
LIBRARY.peers_start.argtypes = [SIZE]
LIBRARY.peers_clip.argtypes = [PTR, SIZE, U32, F64, PTR]
LIBRARY.peers_form.argtypes, LIBRARY.peers_form.restype = [U32, U32], ctypes.c_char_p
LIBRARY.peers_read.argtypes = [U32, PTR, SIZE, PTR]
LIBRARY.peers_multiply.argtypes = [U32, PTR, SIZE, ctypes.c_float]
LIBRARY.peers_copy.argtypes = [U32, PTR, PTR, SIZE]
MEASURE, CLIP_NORM, CLIP_VALUE = range(3)
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def ok(code):
    assert code == 0, f"the library answers {code}"


ok(LIBRARY.peers_start(ARGS.threads))
ANSWER = Answer()
ANSWER_AT = ctypes.addressof(ANSWER)


def call(views, mode, threshold):
    """One clip by gradclip. The answer is overwritten by the next."""
    ok(LIBRARY.peers_clip(views, len(views), mode, threshold, ANSWER_AT))
    return ANSWER


# ---- sets of gradients ----


def random_block(n, seed):
    """Normals, of which an array is made by repetition: making 2^30 of them would take longer than all else."""
    return torch.randn(min(n, 16 * MI), generator=torch.Generator().manual_seed(seed))


def square_sum(tensor):
    """In float64, by numpy, in parts that are summed exactly."""
    parts = (part.double().numpy() for part in tensor.reshape(-1).split(4 * MI))
    return math.fsum(float(np.dot(part, part)) for part in parts)


class TorchSet:
    """Gradients in PyTorch's memory."""

    def __init__(self, tensors):
        self.tensors, self.dtype = tensors, tensors[0].dtype
        self.parameters = []
        for tensor in tensors:
            # A parameter of one element in memory: clips read nothing but its gradient.
            parameter = torch.nn.Parameter(torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
            parameter.grad = tensor
            self.parameters.append(parameter)
        self.views = (View * len(tensors))(*(View(t.data_ptr(), t.numel(), DTYPE_CODES[t.dtype]) for t in tensors))
        self.norm = self.original = self.exact_norm()

    @classmethod
    def large(cls, n, dtype):
        block = random_block(n, 1).to(dtype)
        return cls([block.repeat(n // block.numel())])

    def exact_norm(self):
        return math.sqrt(math.fsum(map(square_sum, self.tensors)))

    def clone(self):
        copy = object.__new__(TorchSet)
        copy.__init__([t.clone() for t in self.tensors])
        return copy

    def ready(self):
        """Makes all large again, before float16 elements lose bits or the norm is so small that eps matters."""
        if self.norm < self.original / 4:
            for tensor in self.tensors:
                tensor.mul_(self.original / self.norm)
            self.norm = self.original


class JaxSet:
    """Gradients in XLA's memory, a list of arrays that the clip donates and replaces by its results."""

    dtype = torch.float32

    def __init__(self, tensors):
        self.arrays = [jnp.array(t.numpy(), copy=True) for t in tensors]
        jax.block_until_ready(self.arrays)
        self.norm = self.original = math.sqrt(math.fsum(map(square_sum, tensors)))
        self.point()

    def point(self):
        self.pointers = [array.unsafe_buffer_pointer() for array in self.arrays]
        pairs = zip(self.pointers, self.arrays, strict=True)
        self.views = (View * len(self.arrays))(*(View(at, a.size, DTYPE_CODES[torch.float32]) for at, a in pairs))

    def ready(self):
        """As that of TorchSet, by PyTorch in XLA's memory."""
        if self.norm < self.original / 4:
            for view in self.views:
                memory = (ctypes.c_float * view.len).from_address(view.data)
                torch.frombuffer(memory, dtype=torch.float32).mul_(self.original / self.norm)
            self.norm = self.original


@functools.partial(jax.jit, donate_argnums=0)
def optax_clip(arrays, max_norm):
    return optax.clip_by_global_norm(max_norm).update(arrays, optax.EmptyState())[0]


def close(got, want, tolerance, what):
    assert abs(got / want - 1) <= tolerance, f"{what}: {got}, not {want}"


# ---- contenders ----


class Contender:
    """One way to do a case's work. `prepare` is not timed and returns the call that is; `check` sees its answer."""

    def __init__(self, name, prepare, check=lambda answer: None):
        self.name, self.prepare, self.check = name, prepare, check


class Times:
    """Seconds of each round, by contender."""

    def __init__(self, contenders):
        self.seconds = {contender.name: [] for contender in contenders}

    def median(self, name):
        return statistics.median(self.seconds[name])

    def least(self, name):
        return min(self.seconds[name])

    def ratio(self, over, under):
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def least_ratio(self, over, under):
        return self.least(over) / self.least(under)

    def fastest(self, *names):
        return min(names, key=self.median)


def race(contenders, rounds, cached=False):
    times = Times(contenders)
    gc.collect()
    gc.disable()
    # The first round warms everything up, compilers too, and does not count.
    for turn in range(-1, rounds):
        for contender in contenders if turn % 2 else contenders[::-1]:
            time.sleep(PAUSE_S)
            if cached:
                contender.check(contender.prepare()())
            timed = contender.prepare()
            start = time.perf_counter_ns()
            answer = timed()
            seconds = (time.perf_counter_ns() - start) * 1e-9
            contender.check(answer)
            if turn >= 0:
                times.seconds[contender.name].append(seconds)
    gc.enable()
    return times


def forms(pass_number):
    names = []
    while name := LIBRARY.peers_form(pass_number, len(names)):
        names.append(name.decode())
    return names


WORD = ctypes.c_uint64()


def limit_pass(pass_number, form, data, n_bytes, to=None):
    """The call of one of the machine's limits. Multiplying is by one: the data stay as they are."""
    if pass_number == 0:
        return lambda: ok(LIBRARY.peers_read(form, data, n_bytes, ctypes.addressof(WORD)))
    if pass_number == 1:
        return lambda: ok(LIBRARY.peers_multiply(form, data, n_bytes, 1.0))
    return lambda: ok(LIBRARY.peers_copy(form, to, data, n_bytes))


PASSES = ["read", "multiply", "copy"]


def find_limits():
    """Each form of each pass, and the fastest of each: the machine's limits."""
    data = TorchSet.large(LARGE, torch.float32)
    copy = torch.zeros(LARGE)
    at, n_bytes = data.tensors[0].data_ptr(), 4 * LARGE
    names, contenders = {}, []
    for number, kind in enumerate(PASSES):
        for form, name in enumerate(forms(number)):
            timed = limit_pass(number, form, at, n_bytes, copy.data_ptr())
            names[f"plain {kind}, {name}"] = (kind, form)
            contenders.append(Contender(f"plain {kind}, {name}", lambda timed=timed: timed))
    times = race(contenders, ROUNDS)
    best = {}
    for kind in PASSES:
        # By the minima, because this is about what the machine can do.
        name = min((name for name, (of, _) in names.items() if of == kind), key=times.least)
        best[kind] = (names[name][1], name)
    rows = []
    for name, (kind, _) in names.items():
        moved = n_bytes * (1 if kind == "read" else 2) / 1e9
        rows.append(
            [
                name,
                f"{moved / times.median(name):.1f}",
                f"{moved / times.least(name):.1f}",
                "the limit" if best[kind][1] == name else "",
            ]
        )
    table(
        "The machine's limits",
        f"{LARGE // MI} Mi float32 elements in PyTorch's memory; GB/s of what is read and written.",
        ["pass", "median", "best", ""],
        rows,
    )
    return best


def limit(kind, grads):
    """The machine's limit as a contender, on a set of one array."""
    [view] = grads.views
    timed = limit_pass(PASSES.index(kind), BEST[kind][0], view.data, view.len * grads.dtype.itemsize)
    return Contender(f"plain {kind}", lambda: timed)


# ---- the report ----

COMPARED = ["case", "peer", "peer ms", "ours ms", "ratio", "of the minima", "wanted", "met"]


def ms(times, name):
    return f"{times.median(name) * 1e3:.3g} ({times.least(name) * 1e3:.3g})"


def compared(case, times, peer, ours=OURS, at_least=None, at_most=None, inverse=False):
    """A row of a table: the peer's time over ours; with `at_most` or `inverse`, ours over the peer's."""
    over, under = (ours, peer) if at_most or inverse else (peer, ours)
    ratio, least = times.ratio(over, under), times.least_ratio(over, under)
    wanted, met = "", ""
    if at_least:
        wanted, met = f">= {at_least:g}", (ratio >= at_least, least >= at_least)
    if at_most:
        wanted, met = f"<= {at_most:g}", (ratio <= at_most, least <= at_most)
    if wanted:
        met = {
            (True, True): "yes",
            (False, False): "no",
            (True, False): "not by minima",
            (False, True): "by minima only",
        }[met]
    print(f"{case}, {peer}: {ratio:.2f} {wanted}", file=sys.stderr, flush=True)
    return [case, peer, ms(times, peer), ms(times, ours), f"{ratio:.2f}", f"{least:.2f}", wanted, met]


# ---- cases ----


def torch_norm(grads, foreach, worst):
    name = TORCH[foreach]

    def check(answer):
        error = abs(answer.item() / grads.norm - 1)
        worst[name] = max(worst.get(name, 0), error)
        close(answer.item(), grads.norm, PEER_TOLERANCE[grads.dtype], name)

    return Contender(name, lambda: functools.partial(get_total_norm, grads.tensors, foreach=foreach), check)


def our_norm(grads, worst=None):
    def check(answer):
        if worst is not None:
            worst[OURS] = max(worst.get(OURS, 0), abs(answer.total_norm / grads.norm - 1))
        close(answer.total_norm, grads.norm, OURS_ERROR, OURS)

    return Contender(OURS, lambda: functools.partial(call, grads.views, MEASURE, 0.0), check)


def clips(grads, clipping):
    """A function that gives a contender the threshold of its next clip, and one that takes what it found and left."""

    def threshold():
        grads.ready()
        return grads.norm * (KEEP if clipping else 2)

    def done(max_norm, found, name):
        # What a peer has left is as wrong as its norm was, so that the norm known here is exact only behind ours.
        close(found, grads.norm, PEER_TOLERANCE[grads.dtype], name)
        if clipping:
            grads.norm = max_norm

    return threshold, done


def torch_clip(grads, clipping, foreach):
    threshold, done = clips(grads, clipping)
    name = TORCH[foreach]
    used = []

    def prepare():
        used[:] = [threshold()]
        return functools.partial(clip_grad_norm_, grads.parameters, used[0], foreach=foreach)

    return Contender(name, prepare, lambda answer: done(used[0], answer.item(), name))


def our_clip(grads, clipping):
    threshold, done = clips(grads, clipping)
    used = []

    def prepare():
        used[:] = [threshold()]
        return functools.partial(call, grads.views, CLIP_NORM, used[0])

    def check(answer):
        assert bool(answer.clipped) == clipping
        done(used[0], answer.total_norm, OURS)

    return Contender(OURS, prepare, check)


def optax_contender(grads, clipping):
    threshold, done = clips(grads, clipping)
    used = []

    def prepare():
        used[:] = [threshold()]
        max_norm = jnp.float32(used[0]).block_until_ready()
        arrays, grads.arrays = grads.arrays, None
        return lambda: jax.block_until_ready(optax_clip(arrays, max_norm))

    def check(arrays):
        grads.arrays = arrays
        before = grads.pointers
        grads.point()
        assert sorted(before) == sorted(grads.pointers), "a donated buffer was not reused"
        # Optax tells no norm; our next answer in the round tells whether this was clipped.
        done(used[0], grads.norm, "Optax")

    return Contender("Optax", prepare, check)


def largest_difference(got, want):
    """Of elements, relative to the largest of them."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a.reshape(-1).split(16 * MI), b.reshape(-1).split(16 * MI), strict=True):
            x, y = x.float(), y.float()
            worst = max(worst, float((x - y).abs().max() / y.abs().max()))
    return worst


def agree(grads, with_optax=False):
    """Compares what all contenders make of copies, before clips are timed. Returns how far the peers are from ours."""
    max_norm = KEEP * grads.norm
    ours = grads.clone()
    call(ours.views, CLIP_NORM, 2 * grads.norm)
    for a, b in zip(ours.tensors, grads.tensors, strict=True):
        assert torch.equal(a, b), "an unclipped clip wrote something"
    call(ours.views, CLIP_NORM, max_norm)
    # Against arithmetic in float64: half a unit in the last place of the result, and float32's rounding before it.
    coefficient = max_norm / (grads.norm + 1e-6)
    for got, had in zip(ours.tensors, grads.tensors, strict=True):
        for x, y in zip(got.reshape(-1).split(16 * MI), had.reshape(-1).split(16 * MI), strict=True):
            x, want = x.double(), y.double() * coefficient
            apart = (x - want).abs() - want.abs() * EPSILON[grads.dtype]
            assert float(apart.max()) <= torch.finfo(grads.dtype).smallest_normal * EPSILON[grads.dtype], (
                "ours is not g times c"
            )
    differences = {}
    peer = grads.clone()
    clip_grad_norm_(peer.parameters, max_norm)
    differences["PyTorch"] = largest_difference(peer.tensors, ours.tensors)
    del peer
    if with_optax:
        arrays = JaxSet(grads.tensors)
        got = jax.block_until_ready(optax_clip(arrays.arrays, jnp.float32(max_norm)))
        got = [torch.from_numpy(np.array(a)) for a in got]
        differences["Optax"] = largest_difference(got, ours.tensors)
    for name, difference in differences.items():
        assert difference <= PEER_TOLERANCE[grads.dtype], f"{name} and ours are {difference} apart"
    return differences


def behind_clips(grads):
    """After a race of clips: one of ours, and then the exact norm must be what it was asked for."""
    grads.ready()
    wanted = grads.norm / 2
    call(grads.views, CLIP_NORM, wanted)
    # Roundings cancel out over many elements, but not wholly over the few mantissas that half precision has.
    tolerance = max(1e-6, EPSILON[grads.dtype] / 4)
    close(grads.exact_norm(), wanted, tolerance, "the norm behind a clip")


def large_arrays():
    """Norm, unclipped and clipped clip, and value clip of one large array beside PyTorch and the limits."""
    rows, limit_rows, error_rows = [], [], []
    size = f"{LARGE // MI} Mi"
    cached = ARGS.quick
    for dtype, norm_wanted, unclipped_wanted, clipped_wanted in [
        (torch.float32, 2, 3, 1.5),
        (torch.bfloat16, 2, None, None),
        (torch.float16, 6, None, None),
    ]:
        grads, name, worst = TorchSet.large(LARGE, dtype), NAMES[dtype], {}
        contenders = [torch_norm(grads, False, worst), torch_norm(grads, True, worst), our_norm(grads, worst)]
        times = race([*contenders, limit("read", grads)], ROUNDS, cached)
        rows.append(compared(f"norm {name}", times, times.fastest(*TORCH.values()), at_least=norm_wanted))
        wanted = 0.9 if dtype == torch.float32 else None
        limit_rows.append(compared(f"norm {name}", times, "plain read", at_least=wanted))
        differences = agree(grads, with_optax=dtype == torch.float32)
        for clipping, wanted in [(False, unclipped_wanted), (True, clipped_wanted)]:
            # Multiplying half precision as if it were float32 moves the same bytes, and by one keeps every bit.
            extra = [limit(kind, grads) for kind in (["read", "multiply"] if clipping else ["read"])]
            contenders = [
                torch_clip(grads, clipping, False),
                torch_clip(grads, clipping, True),
                our_clip(grads, clipping),
            ]
            times = race([*contenders, *extra], ROUNDS, cached)
            case = f"{'clipped' if clipping else 'unclipped'} {name}"
            rows.append(compared(case, times, times.fastest(*TORCH.values()), at_least=wanted))
            floor = "plain read"
            if clipping:
                floor = "plain read and multiply"
                pairs = zip(times.seconds["plain read"], times.seconds["plain multiply"], strict=True)
                times.seconds[floor] = [a + b for a, b in pairs]
            limit_rows.append(compared(case, times, floor))
        behind_clips(grads)
        error_rows.append(
            [
                name,
                f"{max(worst[name] for name in TORCH.values()):.1e}",
                f"{worst[OURS]:.1e}",
                f"{differences['PyTorch']:.1e}",
                f"{differences['Optax']:.1e}" if "Optax" in differences else "",
            ]
        )
        if dtype == torch.float32:
            del grads
            rows.append(value_clip(cached))
    table(
        f"Beside PyTorch: one array of {size} elements",
        "Times are medians (minima). The peer is the faster of `foreach=False` and `foreach=True`, one of which is "
        "what `None`, the default, means; a ratio is its time over ours.",
        COMPARED,
        rows,
    )
    table(
        f"Beside the machine's limits: one array of {size} elements",
        "A ratio is the limit's time over ours.",
        COMPARED,
        limit_rows,
    )
    table(
        "How far the answers are apart",
        "Norms from the float64 one, relative; elements clipped by a peer from ours, relative to the largest.",
        ["dtype", "PyTorch's norm", "our norm", "PyTorch's elements", "Optax's elements"],
        error_rows,
    )


def value_clip(cached):
    """A clip by value: a tenth of the elements and a little more lie outside each time, for the threshold shrinks."""
    grads = TorchSet.large(LARGE, torch.float32)
    peer, ours = grads.clone(), grads.clone()
    clip_grad_value_(peer.parameters, 1.645)
    call(ours.views, CLIP_VALUE, 1.645)
    assert torch.equal(peer.tensors[0], ours.tensors[0]), "a clip by value differs from PyTorch's"
    del peer, ours
    bound = [1.645]

    def tighter():
        bound[0] *= 0.9995
        return bound[0]

    def clamped(name):
        # Elements outside by a hair are clamped to the bound in float32.
        largest = float(grads.tensors[0][:MI].abs().max())
        close(largest, bound[0], 1e-6, name)

    def torch_value(name, foreach):
        def prepare():
            return functools.partial(clip_grad_value_, grads.parameters, tighter(), foreach=foreach)

        return Contender(name, prepare, lambda _: clamped(name))

    def check_ours(answer):
        assert answer.clipped
        clamped(OURS)

    ours = Contender(OURS, lambda: functools.partial(call, grads.views, CLIP_VALUE, tighter()), check_ours)
    times = race([*(torch_value(name, foreach) for foreach, name in TORCH.items()), ours], ROUNDS, cached)
    return compared("by value float32", times, times.fastest(*TORCH.values()), at_least=1.3)


def beside_optax():
    rows = []
    grads = JaxSet(TorchSet.large(LARGE, torch.float32).tensors)
    for clipping, wanted in [(True, 1.0), (False, 0.55)]:
        contenders = [optax_contender(grads, clipping), our_clip(grads, clipping), limit("read", grads)]
        times = race(contenders, ROUNDS, ARGS.quick)
        case = f"{'clipped' if clipping else 'unclipped'} float32"
        rows.append(compared(case, times, "Optax", at_most=wanted))
        if not clipping:
            rows.append(compared("a plain read instead of ours", times, "Optax", ours="plain read", inverse=True))
    table(
        f"Beside Optax: one array of {LARGE // MI} Mi elements",
        "`clip_by_global_norm`, jitted, the buffers donated; ours runs in the same buffers. A ratio is our time over "
        "Optax's. With donated buffers an unclipped step costs Optax no more than its norm, so that no clip that reads "
        "every element can have a smaller ratio than the last row.",
        COMPARED,
        rows,
    )


def small_tensors():
    generator = torch.Generator().manual_seed(2)
    shapes = [(64, 64) if i % 2 else (64,) for i in range(2000)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    rows = []
    agree(TorchSet([t.clone() for t in made]), with_optax=True)
    for clipping in (True, False):
        case = "clipped" if clipping else "unclipped"
        grads = TorchSet([t.clone() for t in made])
        contenders = [torch_clip(grads, clipping, False), torch_clip(grads, clipping, True), our_clip(grads, clipping)]
        times = race(contenders, SMALL_ROUNDS, cached=True)
        rows.append(compared(case, times, times.fastest(*TORCH.values()), at_least=8))
        behind_clips(grads)
        arrays = JaxSet(made)
        times = race([optax_contender(arrays, clipping), our_clip(arrays, clipping)], SMALL_ROUNDS, cached=True)
        rows.append(compared(case, times, "Optax", at_least=5))
    table(
        "2,000 small tensors",
        "1,000 of 64 x 64 and 1,000 of 64, float32, alternating. A ratio is the peer's time over ours.",
        COMPARED,
        rows,
    )


def flatness():
    """Cost of an element from 1 Mi to 1 Gi elements."""
    sizes = [1, 4] if ARGS.quick else [1, 4, 16, 64, 256, 1024]
    rows, cost = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in sizes:
            if size == 1024 and dtype == torch.float32:
                continue
            n = size * MI
            grads = TorchSet.large(n, dtype)
            cached = n * grads.tensors[0].element_size() <= CACHED_BYTES
            rounds = SMALL_ROUNDS if size <= 16 else ROUNDS if size < 1024 else 7
            found = []
            for contender, kind in [(our_norm(grads), "read"), (our_clip(grads, True), "multiply")]:
                times = race([contender, limit(kind, grads)], rounds, cached)
                found.append(times)
                cost.setdefault((dtype, kind), []).append(times.median(OURS) / n)
            nanoseconds = [f"{times.median(name) / n * 1e9:.4f}" for times in found for name in times.seconds]
            rows.append([NAMES[dtype], f"{size} Mi", nanoseconds[0], nanoseconds[1], nanoseconds[2], nanoseconds[3]])
            del grads, contender, found, times
            gc.collect()
    table(
        "Cost of an element",
        "Nanoseconds, medians. Up to 64 MiB, data and threads are warm.",
        ["dtype", "elements", "norm", "plain read", "clipped", "plain multiply"],
        rows,
    )
    spreads = [
        f"{NAMES[dtype]} {'norm' if kind == 'read' else 'clipped'} {max(costs) / min(costs):.2f}"
        for (dtype, kind), costs in cost.items()
    ]
    say("The dearest over the cheapest: " + ", ".join(spreads) + ".\n")


# ---- the machine ----


def machine():
    flags = set(cpu_info("flags").split())
    relevant = [
        f
        for f in ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16"]
        if f in flags
    ]
    pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = re.search(r"\[(\w+)\]", pages.read_text())[1] if pages.exists() else "unknown"

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ["torch", "jax", "optax", "numpy"])
    name = cpu_info("model name") or platform.machine()
    return name, [
        f"- {name}, family {cpu_info('cpu family')}, model {cpu_info('model')}; {' '.join(relevant)}",
        f"- {ARGS.threads} threads on {len(CORES)} of {os.cpu_count()} cores, {memory_gib():.0f} GiB, huge pages: {pages}; "
        f"load before the run {os.getloadavg()[0]:.2f}",
        f"- {run('rustc', '--version')}, Python {platform.python_version()}, {versions}",
        f"- commit {run('git', 'describe', '--always', '--dirty')}; "
        f"`THREADS={ARGS.threads} scripts/bench-cpu.sh{' --quick' if ARGS.quick else ''}`",
    ]


NAME, ABOUT = machine()
say("\n".join(ABOUT) + "\n")
BEST = find_limits()
large_arrays()
beside_optax()
small_tensors()
flatness()
if ARGS.records:
    record(ARGS.records, NAME, "cpu", "the CPU path")
