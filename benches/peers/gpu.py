"""gradclip's GPU path beside PyTorch on the same card. `scripts/bench-gpu.sh` runs this.

How it measures:

- Rounds: ours, theirs, ours, ... A ratio is the median over the rounds of the ratio within a round, because clocks and
  temperatures of a card drift over minutes. Ours is the program (`gradclip bench --json`), theirs runs in this process.
- Every answer that is timed is checked: ours by the program itself, theirs against the norm in float64.
- Gradients lie there alike: as many tensors, of the same lengths.
- Two clocks. The device's: timestamps for ours, CUDA events for theirs, which count the gaps in which the card waits for
  the host. The host's: from the call to a synchronised device, with all that recording and launching costs.
- Where they clip, gradients are put back as they were made before each call, outside the timed part.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch
import torch._dynamo
from report import cpu_info, memory_gib, record, run, say, table
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

parser = argparse.ArgumentParser(description="the GPU path beside PyTorch on the same card")
parser.add_argument("--gradclip", type=pathlib.Path, required=True, help="the built program")
parser.add_argument("--quick", action="store_true", help="small sets and few rounds")
parser.add_argument("--rounds", type=int, help="how many rounds, instead of as many as are usual")
parser.add_argument("--seconds", type=float, help="how long each case is repeated in a round, instead of as usual")
parser.add_argument("--eager", action="store_true", help="leave torch.compile out, which takes minutes")
parser.add_argument("--commit", help="the program's commit, where git does not tell")
parser.add_argument("--records", type=pathlib.Path, help="the folder whose record of this day and machine is added to")
ARGS = parser.parse_args()
ARGS.gradclip = ARGS.gradclip.resolve()

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
KI, MI = 1 << 10, 1 << 20
SMALL = (4_160_000, "2000")
if ARGS.quick:
    SETS, ROUNDS, SECONDS = [(64 * KI, "one"), (MI, "one"), (MI, "transformer"), SMALL], 2, 0.02
elif CUDA:
    SETS, ROUNDS, SECONDS = [(n * MI, "one") for n in (1, 16, 64, 256)], 5, 0.2
    SETS += [(64 * MI, "transformer"), (256 * MI, "transformer"), SMALL]
else:
    SETS, ROUNDS, SECONDS = [(MI, "one"), (16 * MI, "one"), (16 * MI, "transformer"), SMALL], 3, 0.2
ROUNDS, SECONDS = ARGS.rounds or ROUNDS, ARGS.seconds or SECONDS
# From here on the figures hold.
LARGE = 64 * MI
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = ["norm", "unclipped", "clipped", "value"]
# How often each byte moves.
MOVES = {"norm": 1, "unclipped": 1, "clipped": 3, "value": 2}
EAGER, COMPILED = "PyTorch, foreach", "PyTorch, torch.compile"
KINDS = [EAGER] if ARGS.eager else [EAGER, COMPILED]
# Compiling a list of 2,000 tensors takes many minutes, for a graph that no one would wait for.
COMPILED_TENSORS = 1 if ARGS.quick else 300
# By default PyTorch goes back to eager code, silently, once something was compiled for the ninth time.
for option, value in {"recompile_limit": 64, "fail_on_recompile_limit_hit": True}.items():
    if hasattr(torch._dynamo.config, option):
        setattr(torch._dynamo.config, option, value)
# How far PyTorch's norm may be off, relatively: it accumulates float32 in float32, and rounds halves' norms to halves.
TOLERANCE = {torch.float32: 3e-2, torch.bfloat16: 5e-2, torch.float16: 2e-1}
BOUND = 0.5


# ---- ours ----


def program(*arguments):
    command = [str(ARGS.gradclip), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout), done.stderr.strip()


def same_card():
    """The adapter that is PyTorch's card; without one, a software device."""
    adapters = program("devices", "--json")[0]["adapters"]
    # Vulkan before OpenGL, which may list the card once more.
    adapters.sort(key=lambda a: a["backend"] != "Vulkan")
    if CUDA:
        card = torch.cuda.get_device_name(0)
        fitting = [a for a in adapters if a["name"] in card or card in a["name"]]
        advice = f"no adapter is PyTorch's {card}; does its driver bring the Vulkan part?"
    else:
        fitting = [a for a in adapters if a["software"]]
        advice = "no software device; install Mesa's lavapipe (Debian: mesa-vulkan-drivers)"
    if not fitting:
        sys.exit(f"error: {advice} (there are: {[a['name'] for a in adapters]})")
    return fitting[0]


def ours(size, cut, host_clock):
    """Rows by dtype and case, and the speeds of the same run."""
    arguments = ["--sizes", str(size), "--tensors", cut, "--seconds", str(SECONDS), "--adapter", ADAPTER["name"]]
    found, told = program("bench", "--json", *arguments, *(["--host-clock"] if host_clock else []))
    assert found["adapter"] == ADAPTER["name"], found["adapter"]
    clock = "host" if "host's clock" in told else "device"
    return {(row["dtype"], row["case"]): row for row in found["rows"]}, found, clock


# ---- theirs ----


def lengths(size, cut):
    """Twins of `TensorSet::new` and `transformer` in crates/gradclip-cli/src/bench/gradients.rs; each run checks that they are."""
    if cut == "one":
        return [size]
    if cut == "transformer":
        divisor = next(d for d in range(1, 32_001) if sum(transformer(d)) <= size)
        return transformer(divisor)
    count = int(cut)
    short = size // ((count // 2) * 65 + (count % 2) * 64)
    return [short if i % 2 else 64 * short for i in range(count)]


def transformer(divisor):
    hidden, inner, vocabulary = (max(1, dimension // divisor) for dimension in (4096, 11_008, 32_000))
    layer = [hidden * hidden] * 4 + [hidden * inner] * 3 + [hidden] * 2
    return layer * 32 + [vocabulary * hidden] * 2 + [hidden]


class Gradients:
    def __init__(self, size, cut, dtype):
        lens = lengths(size, cut)
        generator = torch.Generator(DEVICE).manual_seed(1)
        block = torch.rand(min(max(lens), 16 * MI), generator=generator, device=DEVICE).mul_(2).sub_(1).to(dtype)
        self.made = [block.repeat(math.ceil(n / block.numel()))[:n].clone() for n in lens]
        self.parameters = []
        for made in self.made:
            # A parameter of one element in memory: clips read nothing but its gradient.
            parameter = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=DEVICE).expand(made.shape))
            parameter.grad = made.clone()
            self.parameters.append(parameter)
        self.grads = [parameter.grad for parameter in self.parameters]
        self.dtype = dtype
        self.norm = self.exact_norm()

    def exact_norm(self):
        # In parts: all at once would take twice the memory.
        parts = (part.double().square().sum().item() for t in self.grads for part in t.split(16 * MI))
        return math.sqrt(math.fsum(parts))

    def restore(self):
        torch._foreach_copy_(self.grads, self.made)


def norm_of(grads):
    return get_total_norm(grads, foreach=True)


def clip_to(parameters, max_norm):
    return clip_grad_norm_(parameters, max_norm, foreach=True)


def clamp_to(parameters, bound):
    return clip_grad_value_(parameters, bound, foreach=True)


def calls(grads, kind):
    """The call of each case."""
    wrap = torch.compile if kind == COMPILED else lambda f: f
    measure, clip, clamp = wrap(norm_of), wrap(clip_to), wrap(clamp_to)
    return {
        "norm": lambda: measure(grads.grads),
        "unclipped": lambda: clip(grads.parameters, 2 * grads.norm),
        "clipped": lambda: clip(grads.parameters, grads.norm / 2),
        "value": lambda: clamp(grads.parameters, BOUND),
    }


def check(grads, case, answer):
    def close(got, want, what):
        assert abs(got / want - 1) <= TOLERANCE[grads.dtype], f"{what} of {case} is {got}, not {want}"

    if case != "value":
        close(float(answer), grads.norm, "PyTorch's norm")
    if case == "clipped":
        close(grads.exact_norm(), grads.norm / 2, "what PyTorch leaves")
    if case == "value":
        largest = max(float(t.abs().max()) for t in grads.grads)
        assert largest == BOUND, largest


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(call, clock):
    synchronize()
    if clock == "device" and CUDA:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        answer = call()
        end.record()
        synchronize()
        return begin.elapsed_time(end) * 1e-3, answer
    start = time.perf_counter()
    answer = call()
    synchronize()
    return time.perf_counter() - start, answer


def timed(grads, case, call, clock):
    """The median of some calls; the first ones warm up, and compile."""
    seconds, warm = [], 3
    start = None
    while start is None or len(seconds) < 3 or time.perf_counter() - start < SECONDS:
        grads.restore()
        took, answer = seconds_of(call, clock)
        if warm:
            warm -= 1
            # Reading all of it back costs more than what is timed.
            check(grads, case, answer)
            continue
        start = start or time.perf_counter()
        seconds.append(took)
        if case != "value":
            assert abs(float(answer) / grads.norm - 1) <= TOLERANCE[grads.dtype], float(answer)
    check(grads, case, answer)
    grads.restore()
    return statistics.median(seconds)


NOT_MEASURED = []


def not_measured(what, why):
    line = f"{what}: {why}"
    if line not in NOT_MEASURED:
        NOT_MEASURED.append(line)


# ---- copies ----


def copies():
    """What copies a buffer on this device, by name."""
    found = {"torch copy_": lambda to, frm: to.copy_(frm)}
    if not CUDA:
        not_measured("Triton's and CuPy's copies", "they need a CUDA device")
        return found
    try:
        found["Triton"] = triton_copy()
    except Exception as error:
        not_measured("Triton's copy", f"{type(error).__name__}: {error}".splitlines()[0])
    try:
        import cupy

        def cupy_copy(to, frm):
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                cupy.copyto(cupy.from_dlpack(to), cupy.from_dlpack(frm))

        found["CuPy"] = cupy_copy
    except Exception as error:
        not_measured("CuPy's copy", f"{type(error).__name__}: {error}".splitlines()[0])
    return found


if triton:

    @triton.jit
    def copy_kernel(to, frm, n, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(to + at, tl.load(frm + at, mask=at < n), mask=at < n)


def triton_copy():
    if not triton:
        raise ImportError("there is no module triton")

    def copy(to, frm):
        copy_kernel[(triton.cdiv(frm.numel(), 4096),)](to, frm, frm.numel(), BLOCK=4096, num_warps=8)

    probe = torch.arange(10_000, dtype=torch.int32, device=DEVICE)
    copied = torch.zeros_like(probe)
    copy(copied, probe)
    assert torch.equal(copied, probe), "Triton's copy is wrong"
    return copy


def copy_speeds():
    """GB/s, by name; a byte copied counts twice."""
    n = (8 if ARGS.quick or not CUDA else 128) * MI
    frm = torch.randint(0, 1 << 30, (n,), dtype=torch.int32, device=DEVICE)
    to, speeds = torch.empty_like(frm), {}
    for name, copy in COPIES.items():
        to.zero_()
        seconds = [seconds_of(lambda copy=copy: copy(to, frm), "device")[0] for _ in range(12)][2:]
        assert torch.equal(to, frm), f"{name} does not copy"
        speeds[name] = 2 * 4 * n / 1e9 / statistics.median(seconds)
    return speeds


# ---- the comparison ----


def ms(values):
    return f"{statistics.median(values) * 1e3:.3g}"


def race(size, cut):
    """Seconds by clock, dtype, case and contender: a list with one for each round."""
    clocks = ["device", "host"] if CUDA else ["host"]
    found, speeds = {}, []
    # For all rounds, because each would be compiled for anew.
    theirs = {}
    for dtype, torch_dtype in DTYPES.items():
        grads = Gradients(size, cut, torch_dtype)
        theirs[dtype] = grads, {kind: calls(grads, kind) for kind in KINDS}
        if COMPILED in KINDS and len(grads.grads) > COMPILED_TENSORS:
            del theirs[dtype][1][COMPILED]
            not_measured(f"{COMPILED}, {len(grads.grads):,} tensors", "compiling takes minutes")
    for turn in range(ROUNDS):
        for clock in clocks:
            rows, outcome, told = ours(size, cut, clock == "host")
            if told != clock:
                not_measured("ours by the device's clock", "the device has no timestamps")
                continue
            for (dtype, case), row in rows.items():
                expected = lengths(size, cut)
                assert (row["elements"], row["tensors"]) == (sum(expected), len(expected)), row
                found.setdefault((clock, dtype, case, "gradclip"), []).append(row["seconds"])
            speeds.append((outcome["copy_gb_s"], outcome["read_gb_s"]))
        for dtype, (grads, kinds) in theirs.items():
            for kind, cases in kinds.items():
                for case, call in list(cases.items()):
                    try:
                        for clock in clocks:
                            seconds = timed(grads, case, call, clock)
                            found.setdefault((clock, dtype, case, kind), []).append(seconds)
                    except Exception as error:
                        if kind == EAGER:
                            raise
                        first = str(error).strip().splitlines() or [""]
                        not_measured(f"{COMPILED}, {case}, {dtype}", f"{type(error).__name__}: {first[0]}")
                        del cases[case]
        print(f"{size} elements, {cut}: round {turn + 1} of {ROUNDS}", file=sys.stderr, flush=True)
    # Compiled code of one set is of no use to the next.
    del theirs, grads, kinds, cases, call
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return found, speeds


def wanted_of(size, cut, case):
    """What the issue wants of our time over PyTorch's foreach."""
    if cut == SMALL[1]:
        return 0.5 if case in ("unclipped", "clipped") else None
    if size < LARGE:
        return None
    return {"unclipped": 0.4, "clipped": 1.0}.get(case)


def verdict(ratio, wanted, at_least=False):
    if wanted is None:
        return ["", ""]
    met = ratio >= wanted if at_least else ratio <= wanted
    sign = ">=" if at_least else "<="
    return [f"{sign} {wanted:g}", ("yes" if met else "no") if CUDA else f"({'yes' if met else 'no'})"]


def compare(size, cut):
    found, speeds = race(size, cut)
    elements, tensors = sum(lengths(size, cut)), len(lengths(size, cut))
    rows = []
    for clock in ("device", "host"):
        for dtype in DTYPES:
            for case in CASES:
                mine = found.get((clock, dtype, case, "gradclip"))
                theirs = {kind: found.get((clock, dtype, case, kind)) for kind in (EAGER, COMPILED)}
                if not mine or not theirs[EAGER]:
                    continue
                ratios = {
                    kind: statistics.median(a / b for a, b in zip(mine, seconds))
                    for kind, seconds in theirs.items()
                    if seconds and len(seconds) == len(mine)
                }
                rows.append(
                    [
                        clock,
                        dtype,
                        case,
                        ms(theirs[EAGER]),
                        ms(theirs[COMPILED]) if theirs[COMPILED] else "",
                        ms(mine),
                        f"{ratios[EAGER]:.2f}",
                        *verdict(ratios[EAGER], wanted_of(size, cut, case)),
                        f"{ratios[COMPILED]:.2f}" if COMPILED in ratios else "",
                    ]
                )
    what = "one tensor" if tensors == 1 else f"{tensors:,} tensors"
    table(
        f"{elements:,} elements in {what}",
        "Milliseconds, medians. A ratio is our time over theirs, so that less is better.",
        ["clock", "dtype", "case", "foreach", "compiled", "ours", "ours / foreach", "wanted", "met", "ours / compiled"],
        rows,
    )
    return found, speeds, elements


def against_the_copy(found, speeds, elements, size, cut, ceiling):
    """Norm and scaling beside the fastest copy, by bytes moved."""
    clock = "device" if CUDA else "host"
    rows = []
    for dtype, torch_dtype in DTYPES.items():
        n_bytes = elements * torch_dtype.itemsize
        seconds = {case: found.get((clock, dtype, case, "gradclip")) for case in CASES}
        if not all(seconds.values()):
            continue
        scaling = [max(a - b, 1e-12) for a, b in zip(seconds["clipped"], seconds["unclipped"])]
        for name, values, moves in [("norm", seconds["norm"], 1), ("scaling", scaling, 2)]:
            speed = moves * n_bytes / 1e9 / statistics.median(values)
            share = speed / ceiling
            wanted = 0.9 if size >= LARGE and cut == "one" else None
            rows.append(
                [
                    f"{elements:,} in {'one tensor' if cut == 'one' else cut}",
                    dtype,
                    name,
                    f"{speed:.1f}",
                    f"{share:.2f}",
                    *verdict(share, wanted, at_least=True),
                ]
            )
    return rows


def machine():
    versions = f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}"
    quick = " --quick" if ARGS.quick else ""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    commit = ARGS.commit or described.stdout.strip()
    cpu = cpu_info("model name") or platform.machine()
    about = [
        f"- ours on {ADAPTER['name']} ({ADAPTER['backend']}, {ADAPTER['device_type']}; driver {ADAPTER['driver']})",
        f"- host: {cpu}, {os.cpu_count()} cores, {memory_gib():.0f} GiB; load before the run {os.getloadavg()[0]:.2f}",
        f"- {versions}; {run(str(ARGS.gradclip), '--version')}, commit {commit or 'unknown'}",
        f"- `scripts/bench-gpu.sh{quick}`: {ROUNDS} rounds, {SECONDS} s a case",
    ]
    if not CUDA:
        return ADAPTER["name"], [f"- theirs on the CPU, {torch.get_num_threads()} threads", *about]
    properties = torch.cuda.get_device_properties(0)
    theirs = (
        f"- theirs on {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    )
    return properties.name, [theirs, *about]


LOUD = """**NOT A GPU. PyTorch runs on the CPU here, and gradclip on a software device: these ratios mean nothing about a
GPU.** They show that the script works, no more. Verdicts in brackets count for nothing."""

ADAPTER = same_card()
COPIES = copies()
NAME, ABOUT = machine()
say("\n".join(ABOUT) + "\n")
if not CUDA:
    say(LOUD + "\n")
before = copy_speeds()
outcomes = [(size, cut, *compare(size, cut)) for size, cut in SETS]
after = copy_speeds()
best_of = {name: max(before[name], after[name]) for name in before}
our_copies = [copy for *_, speeds, _ in outcomes for copy, _ in speeds]
our_reads = [read for *_, speeds, _ in outcomes for _, read in speeds]
rows = [[name, f"{speed:.1f}"] for name, speed in best_of.items()]
rows.append(["gradclip's copy", f"{statistics.median(our_copies):.1f}"])
rows.append(["gradclip's read", f"{statistics.median(our_reads):.1f}"])
table("Copies", "GB/s; a byte copied counts twice.", ["what", "GB/s"], rows)
# On the CPU theirs copies memory by other means than the software device has.
ceiling = max([statistics.median(our_copies), *(best_of.values() if CUDA else [])])
table(
    "Beside the copy",
    f"GB/s of bytes moved over {ceiling:.1f}, the fastest copy{'' if CUDA else ' of our device'}. Scaling is a clipped "
    "step less an unclipped one.",
    ["elements", "dtype", "pass", "GB/s", "of the copy", "wanted", "met"],
    [row for size, cut, found, speeds, n in outcomes for row in against_the_copy(found, speeds, n, size, cut, ceiling)],
)
if not CUDA:
    not_measured("anything on a GPU", "PyTorch finds no CUDA device")
if NOT_MEASURED:
    say("Not measured:\n")
    say("\n".join(f"- {line}" for line in NOT_MEASURED) + "\n")
if not CUDA:
    print(LOUD, file=sys.stderr)
if ARGS.records:
    record(ARGS.records, NAME, "gpu", "the GPU path")
