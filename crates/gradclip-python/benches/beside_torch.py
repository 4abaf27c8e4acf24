"""Measures gradclip beside PyTorch's own functions, on two threads: medians of runs by turns, and their ratio.

Run it with the package as it is installed (a release build), and with RAYON_NUM_THREADS=2:

    RAYON_NUM_THREADS=2 python crates/gradclip-python/benches/beside_torch.py [MEBI_ELEMENTS]
"""

import statistics
import sys
import time

import gradclip
import torch

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


def beside(name, params, max_norm, repeat, runs):
    # Gradients shrink little, so that none becomes denormal.
    ours = lambda: gradclip.clip_grad_norm_(params, max_norm())  # noqa: E731
    theirs = lambda: torch.nn.utils.clip_grad_norm_(params, max_norm())  # noqa: E731
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
beside("one tensor of 64 elements", parameters([64], torch.float32), never, 200, 31)
one = parameters([64], torch.float32)
beside("the same, clipped", one, shrinking(one), 50, 15)
small = parameters([2100] * 2000, torch.float32)
beside("2,000 small tensors", small, never, 1, 31)
beside("the same, clipped", small, shrinking(small), 1, 31)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    large = parameters([LARGE], dtype)
    name = f"{LARGE >> 20} Mi {str(dtype).removeprefix('torch.')}"
    beside(f"{name}, unclipped", large, never, 1, 9)
    beside(f"{name}, clipped", large, shrinking(large), 1, 9)
    del large
