"""Guards against tensors on another device that are clipped otherwise, or not at all, or in silence.

There is no such device here. `device_fallback` takes CPU tensors in these tests, and is compared with the CPU's own path.
"""

import math

import gradclip
import pytest
import torch
from gradclip import _fallback, _memory


class Elsewhere:
    """A device that has no memory here."""

    type = "cuda"

    def __str__(self):
        return "cuda:0"


class OnGpu(torch.Tensor):
    device = Elsewhere()


@pytest.fixture
def all_elsewhere(monkeypatch):
    monkeypatch.setattr(_fallback, "needed", lambda tensors: True)


def test_an_error_says_what_to_do():
    tensor = torch.ones(2).as_subclass(OnGpu)
    with pytest.raises(gradclip.DeviceError, match="'w' is on cuda:0.*device_fallback=True"):
        gradclip.clip({"w": tensor}, max_norm=1.0)
    assert _fallback.needed([tensor]) and not _fallback.needed([torch.ones(2)])


@pytest.mark.parametrize("dtype", list(_memory.torch_codes(torch)))
@pytest.mark.parametrize(
    "settings",
    [
        {"max_norm": 1.0},
        {"max_norm": 1.0, "scope": "tensor", "norm_type": 1},
        {"max_norm": 0.5, "norm_type": "inf", "grad_scale": 4.0},
        {"max_norm": 100.0},
        {"clip_value": 0.5},
        {"clip_value": 0.5, "report_norm": True},
        {"clip_value": 0.5, "grad_scale": 2.0},
    ],
)
def test_the_same_report_and_gradients(all_elsewhere, monkeypatch, dtype, settings):
    tensors = {"a": torch.arange(-3.0, 4.0).to(dtype), "b": torch.ones(2, 2, dtype=dtype), "c": torch.ones(0, dtype=dtype)}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        report = gradclip.clip(tensors, device_fallback=True, **settings)
    except RuntimeError as error:
        # PyTorch 1.13 has no clamp of float16 on the CPU.
        assert "not implemented for 'Half'" in str(error)
        return
    expected = gradclip.clip(copies, **settings)
    for name in ("total_norm", "clip_coef"):
        assert getattr(report, name) == pytest.approx(getattr(expected, name), rel=1e-6, nan_ok=True)
    assert (report.clipped, report.elements, report.tensors) == (expected.clipped, expected.elements, expected.tensors)
    assert [s.name for s in report.segments] == [s.name for s in expected.segments]
    off = {torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
    assert all(torch.allclose(tensors[n].double(), copies[n].double(), rtol=off) for n in tensors)


def test_non_finite_gradients(all_elsewhere):
    for policy in ("error", "skip", "propagate"):
        tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, math.nan, math.inf])}
        found = gradclip.NonFinite(2, 1, "b", 1)
        if policy == "error":
            with pytest.raises(gradclip.NonFiniteError, match="index 1 of tensor 'b'") as raised:
                gradclip.clip(tensors, max_norm=1.0, device_fallback=True)
            assert raised.value.non_finite == found
        else:
            report = gradclip.clip(tensors, max_norm=1.0, non_finite=policy, device_fallback=True)
            assert report.non_finite == found and (report.skipped == "non-finite") == (policy == "skip")
        assert tensors["a"].isnan().all() == (policy == "propagate")
        assert gradclip.norm(tensors, device_fallback=True).non_finite is not None


def test_the_drop_in(all_elsewhere):
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3e20, 4e20])
    assert float(gradclip.clip_grad_norm_([param], 1.0, device_fallback=True)) == pytest.approx(5e20)
    assert param.grad.tolist() == pytest.approx([0.6, 0.8])
    assert float(gradclip.get_total_norm([param.grad], device_fallback=True)) == pytest.approx(1.0)
    gradclip.clip_grads_with_norm_([param], 0.5, torch.tensor(1.0), device_fallback=True)
    gradclip.clip_grad_value_([param], 0.35, device_fallback=True)
    assert param.grad.tolist() == pytest.approx([0.3, 0.35], rel=1e-5)
    param.grad[0] = math.nan
    with pytest.raises(RuntimeError, match="non-finite, so it cannot be clipped"):
        gradclip.clip_grad_norm_([param], 1.0, error_if_nonfinite=True, device_fallback=True)


def test_what_the_fallback_cannot_do_is_an_error(all_elsewhere):
    tensor = torch.ones(2, 2)
    for settings in ({"max_rms": 1.0}, {"max_norm": 1.0, "scope": "unit"}, {"max_norm": 1.0, "non_finite": "drop"},
                     {"max_norm": 1.0, "threshold": gradclip.ZClip()}, {"max_norm": -1.0}):  # fmt: skip
        with pytest.raises(ValueError):
            gradclip.clip([tensor], device_fallback=True, **settings)
    assert tensor.sum() == 4
