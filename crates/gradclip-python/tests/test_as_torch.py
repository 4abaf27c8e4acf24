"""Guards against a difference from PyTorch that the README does not name: both clip copies of random gradients."""

import copy
import math
import os
import random

import gradclip
import pytest
import torch

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# How far a norm and an element of PyTorch may be off: its norm has the gradients' dtype, and PyTorch 1.13 adds up in it too.
OFF = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.1}
# How far ours may be: a rounding of the element.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1.3e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CASES = 1000 if os.environ.get("GRADCLIP_WHOLE") else 100


def gradient(rng, dtype):
    shape = rng.choice([(), (0,), (1,), (7,), (64,), (3, 5), (2, 3, 4, 5), (1, 1), (4, 0, 2), (300, 7)])
    grad = (torch.randn(shape, dtype=torch.float64) * 10 ** rng.uniform(-2, 1)).to(dtype)
    layout = rng.choice(["plain", "plain", "transposed", "channels last", "gaps"])
    if layout == "transposed" and grad.dim() >= 2:
        grad = grad.transpose(0, 1)
    elif layout == "channels last" and grad.dim() == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    elif layout == "gaps" and grad.dim() == 1:
        grad = torch.stack([grad, grad], 1)[:, 0]
    return grad


def parameters(rng, dtypes):
    found = []
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        dtype = rng.choice(dtypes)
        grad = gradient(rng, dtype)
        param = torch.nn.Parameter(torch.empty(grad.shape, dtype=dtype))
        if rng.random() > 0.1:
            param.grad = grad
        found.append(param)
    return found


def same(ours, theirs, off):
    for a, b in zip(ours, theirs):
        if b.grad is None:
            assert a.grad is None
            continue
        assert a.grad.dtype == b.grad.dtype and a.grad.stride() == b.grad.stride()
        assert torch.allclose(a.grad.double(), b.grad.double(), rtol=2 * off, atol=1e-7, equal_nan=True), (a.grad, b.grad)


def same_norm(ours, theirs, off):
    ours, theirs = float(ours), float(theirs)
    assert ours == pytest.approx(theirs, rel=2 * off, nan_ok=True), (ours, theirs)


@pytest.mark.parametrize("seed", range(CASES))
def test_norms_and_gradients(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ours = parameters(rng, DTYPES if rng.random() < 0.5 else [rng.choice(DTYPES)])
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours, theirs):
        b.grad = None if a.grad is None else a.grad.clone(memory_format=torch.preserve_format)
        if a.grad is not None and a.grad.stride() != b.grad.stride():
            b.grad = torch.empty_strided(a.grad.shape, a.grad.stride(), dtype=a.grad.dtype).copy_(a.grad)
    off = max([OFF[p.grad.dtype] for p in ours if p.grad is not None], default=0.0)
    p = rng.choice([2.0, 2, 1.0, 1, 3.0, 0.5, math.inf, "inf", float("inf")])
    grads = [q.grad for q in ours if q.grad is not None]
    # PyTorch has no largest element of none.
    if float(p) == math.inf and any(g.numel() == 0 for g in grads):
        p = 2.0
    exact = float(torch.cat([g.double().flatten() for g in grads]).norm(float(p))) if grads else 0.0
    # A float16 norm above 65504 is infinite there.
    if exact > 6e4:
        return
    bad = rng.random()
    if bad < 0.2 and grads and grads[0].numel():
        value = rng.choice([math.nan, math.inf, -math.inf])
        for params in (ours, theirs):
            next(q.grad for q in params if q.grad is not None).view(-1)[-1:].fill_(value) if grads[
                0
            ].is_contiguous() else None
    max_norm = rng.choice([0.0, exact / 2, exact * 2, 1.0, math.inf])
    one = len(ours) == 1 and rng.random() < 0.5
    norm = gradclip.clip_grad_norm_(ours[0] if one else (q for q in ours), max_norm, p)
    if exact == exact and bad >= 0.2:
        assert float(norm) == pytest.approx(exact, rel=1e-6, abs=1e-37)
        coef = min(1.0, max_norm / (exact + 1e-6))
        for a, b in zip(ours, theirs):
            if a.grad is not None:
                tolerance = ROUNDING[a.grad.dtype]
                assert torch.allclose(a.grad.double(), b.grad.double() * coef, rtol=tolerance, atol=3.1e-8)
    try:
        expected = torch.nn.utils.clip_grad_norm_(theirs[0] if one else theirs, max_norm, p)
    except RuntimeError as error:
        # PyTorch 1.13 cannot clip float16.
        assert "not implemented for 'Half'" in str(error)
        return
    assert norm.shape == () and norm.device.type == "cpu"
    wide = any(g.dtype == torch.float64 for g in grads)
    assert norm.dtype == (torch.float64 if wide else torch.float32)
    same_norm(norm, expected, off)
    same(ours, theirs, off)


@pytest.mark.parametrize("seed", range(CASES))
def test_values(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ours = parameters(rng, DTYPES)
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours, theirs):
        b.grad = (
            None if a.grad is None else torch.empty_strided(a.grad.shape, a.grad.stride(), dtype=a.grad.dtype).copy_(a.grad)
        )
    if rng.random() < 0.3:
        for params in (ours, theirs):
            grads = [q.grad for q in params if q.grad is not None and q.grad.numel() and q.grad.is_contiguous()]
            for grad, value in zip(grads, [math.nan, math.inf, -math.inf]):
                grad.view(-1)[0] = value
    bound = rng.choice([0.0, 0.1, 1.0, math.inf])
    assert gradclip.clip_grad_value_(ours, bound) is None
    # Without gradients PyTorch 2.15 fails; 1.13 has no clamp of float16.
    theirs = [q for q in theirs if q.grad is not None]
    ours = [q for q in ours if q.grad is not None]
    for q in theirs:
        wide = q.grad.float() if q.grad.dtype == torch.float16 else q.grad
        q.grad.copy_(wide.clamp(-bound, bound))
    if theirs and hasattr(torch.nn.utils, "get_total_norm"):
        torch.nn.utils.clip_grad_value_(theirs, bound)
    for a, b in zip(ours, theirs):
        assert torch.equal(a.grad.double().nan_to_num(7.0), b.grad.double().nan_to_num(7.0))


@pytest.mark.skipif(not hasattr(torch.nn.utils, "get_total_norm"), reason="PyTorch has it since 2.6")
@pytest.mark.parametrize("seed", range(50))
def test_the_two_halves(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ours = [p for p in parameters(rng, [torch.float32]) if p.grad is not None]
    theirs = copy.deepcopy(ours)
    for a, b in zip(ours, theirs):
        b.grad = torch.empty_strided(a.grad.shape, a.grad.stride(), dtype=a.grad.dtype).copy_(a.grad)
    norm = gradclip.get_total_norm([p.grad for p in ours])
    expected = torch.nn.utils.get_total_norm([p.grad for p in theirs])
    same_norm(norm, expected, 1e-5)
    for given in (norm, torch.tensor(math.inf), torch.tensor(math.nan)):
        assert gradclip.clip_grads_with_norm_(ours, 0.5, given) is None
        torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, given)
        same(ours, theirs, 1e-5)


@pytest.mark.parametrize("norm_type", [2.0, 1, "inf"])
def test_error_if_nonfinite(norm_type):
    message = None
    for clip in (torch.nn.utils.clip_grad_norm_, gradclip.clip_grad_norm_):
        param = torch.nn.Parameter(torch.zeros(3))
        param.grad = torch.tensor([1.0, math.nan, 2.0])
        with pytest.raises(RuntimeError) as raised:
            clip([param], 1.0, norm_type, error_if_nonfinite=True)
        assert torch.equal(param.grad[::2], torch.tensor([1.0, 2.0]))
        # PyTorch's own text comes first, in whichever version.
        message = message or str(raised.value).partition("non-finite")[0]
        assert str(raised.value).startswith(message)
    assert "index 1 of gradient 0" in str(raised.value)


def test_nothing_to_clip():
    for params in ([], [torch.nn.Parameter(torch.zeros(2))], torch.nn.Parameter(torch.zeros(2))):
        norm = gradclip.clip_grad_norm_(params, 1.0)
        assert norm == 0.0 and norm.dtype == torch.float32
        gradclip.clip_grad_value_(params, 1.0)
        gradclip.clip_grads_with_norm_(params, 1.0, torch.tensor(1.0))
    assert gradclip.get_total_norm([]) == 0.0
    with pytest.warns(UserWarning, match="empty generator"):
        gradclip.clip_grad_norm_((p for p in []), 1.0)
    assert gradclip.clip_grad_norm_([], 1.0, foreach=True) == 0.0


def test_what_differs_on_purpose():
    param = torch.nn.Parameter(torch.zeros(4))
    # Huge and tiny gradients are clipped rightly.
    for size in (1e20, 1e-25):
        param.grad = torch.full((4,), size)
        assert float(gradclip.clip_grad_norm_([param], size, norm_type=2)) == pytest.approx(2 * size, rel=1e-6)
    param.grad = torch.full((4,), 1e20)
    gradclip.clip_grad_norm_([param], 1.0)
    assert torch.allclose(param.grad, torch.full((4,), 0.5))
    # The norm of half-precision gradients is float32.
    half = torch.nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    half.grad = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    exact = float(half.grad.double().norm())
    assert float(gradclip.clip_grad_norm_([half], 100.0)) == pytest.approx(exact, rel=1e-7)
    # What makes no sense is an error, and nothing is written.
    before = param.grad.clone()
    for arguments in ((-1.0,), (math.nan,), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan)):
        with pytest.raises(ValueError):
            gradclip.clip_grad_norm_([param], *arguments)
    with pytest.raises(ValueError, match="clip_value is -1"):
        gradclip.clip_grad_value_([param], -1.0)
    assert torch.equal(param.grad, before) and param.grad._version == 1
