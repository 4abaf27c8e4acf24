"""Measures gradclip beside PyTorch's own functions, on two threads: medians of runs by turns, and their ratio.

Run it with the package as it is installed (a release build), and with RAYON_NUM_THREADS=2:

    RAYON_NUM_THREADS=2 python crates/gradclip-python/benches/beside_torch.py [MEBI_ELEMENTS]

With OMP_WAIT_POLICY=PASSIVE, PyTorch's other thread does not spin on a core while ours works. If DeepSpeed is installed, its
CPUAdam is measured too (DS_ACCELERATOR=cpu).
"""

import functools
import itertools
import statistics
import sys
import time

import gradclip
import torch

try:
    from deepspeed.ops.adam import DeepSpeedCPUAdam as CPUAdam
except ImportError:
    CPUAdam = None

torch.set_num_threads(2)
LARGE = int(sys.argv[1] if len(sys.argv) > 1 else 128) << 20


def parameters(sizes, dtype):
    params = []
    for size in sizes:
        param = torch.nn.Parameter(torch.empty(0, dtype=dtype))
        grad = torch.empty(size, dtype=dtype).normal_()
        param.data = grad.new_empty(1).expand(size)
        param.grad = grad
        params.append(param)
    return params


def seconds(call, repeat):
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - begin) / repeat


def clips(name, params, max_norm, repeat, runs):
    # Gradients shrink little, so that none becomes denormal.
    ours = lambda: gradclip.clip_grad_norm_(params, max_norm())  # noqa: E731
    theirs = lambda: torch.nn.utils.clip_grad_norm_(params, max_norm())  # noqa: E731
    beside(name, ours, theirs, repeat, runs)


def steps(name, params, runs, grads=None):
    """AdamW with a clip by norm: ours in one, and PyTorch's clip and then its fused step, or DeepSpeed's."""
    norm = float(gradclip.get_total_norm(grads or [p.grad for p in params]))
    for limit, clipped in ((1e30, ""), (norm / 2, ", clipped")):
        # What PyTorch has clipped is still above this.
        ours = gradclip.AdamW(params, lr=1e-5, max_norm=limit / 2)
        peers = {"": torch.optim.AdamW(params, lr=1e-5, fused=True)}
        if CPUAdam is not None and grads is None:
            peers[", DeepSpeed"] = CPUAdam(params, lr=1e-5, adamw_mode=True)
        taken = itertools.count()

        def step(theirs):
            if grads is not None:
                for p, grad in zip(params, grads):
                    p.grad = grad.float()
            # A little below the norm of gradients that it has clipped already.
            torch.nn.utils.clip_grad_norm_(params, limit * 0.999**next(taken))
            theirs.step()

        for peer, theirs in peers.items():
            call = functools.partial(step, theirs)
            beside(f"AdamW, {name}{clipped}{peer}", lambda: ours.step(grads=grads), call, 1, runs)


def beside(name, ours, theirs, repeat, runs):
    ours(), theirs()
    taken = [(seconds(ours, repeat), seconds(theirs, repeat)) for _ in range(runs)]
    a, b = (statistics.median(times) for times in zip(*taken))
    least = min(x for x, _ in taken) / min(x for _, x in taken)
    unit, scale = ("us", 1e6) if b < 1e-3 else ("ms", 1e3)
    print(f"| {name} | {a * scale:.3g} {unit} | {b * scale:.3g} {unit} | {a / b:.2f} | {least:.2f} |", flush=True)


def shrinking(params):
    """A threshold that clips by a thousandth at each call."""
    norm = [float(gradclip.get_total_norm([p.grad for p in params]))]

    def threshold():
        norm[0] *= 0.999
        return norm[0]

    return threshold


never = lambda: 1e30  # noqa: E731
print("| | gradclip | PyTorch | ratio | of the least |\n|---|---|---|---|---|")
clips("one tensor of 64 elements", parameters([64], torch.float32), never, 200, 31)
one = parameters([64], torch.float32)
clips("the same, clipped", one, shrinking(one), 50, 15)
small = parameters([2100] * 2000, torch.float32)
clips("2,000 small tensors", small, never, 1, 31)
clips("the same, clipped", small, shrinking(small), 1, 31)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    large = parameters([LARGE], dtype)
    name = f"{LARGE >> 20} Mi {str(dtype).removeprefix('torch.')}"
    clips(f"{name}, unclipped", large, never, 1, 9)
    clips(f"{name}, clipped", large, shrinking(large), 1, 9)
    del large

# A step needs parameters of their own memory.
for name, sizes, runs in (("2,000 small tensors", [2100] * 2000, 31), (f"{LARGE >> 20} Mi float32", [LARGE], 9)):
    params = [torch.nn.Parameter(torch.empty(size).normal_()) for size in sizes]
    for p in params:
        p.grad = torch.empty_like(p).normal_()
    steps(name, params, runs)
bfloat16 = [p.grad.bfloat16() for p in params]
for p in params:
    p.grad = None
steps(f"{LARGE >> 20} Mi float32 with bfloat16 gradients", params, 9, bfloat16)
