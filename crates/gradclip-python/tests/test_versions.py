"""Guards against gradients that autograd had saved, and that changed unnoticed."""

import gradclip
import numpy as np
import pytest
import torch


def with_grad(values, dtype=torch.float32):
    param = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    param.grad = torch.tensor(values, dtype=dtype)
    return param


def test_counters_of_what_was_written_and_of_nothing_else():
    params = [with_grad([3.0]), with_grad([4.0]), with_grad([])]
    versions = lambda: [p.grad._version for p in params]  # noqa: E731
    gradclip.clip_grad_norm_(params, 10.0)
    gradclip.clip_grad_value_(params, 10.0)
    gradclip.clip_grads_with_norm_(params, 10.0, torch.tensor(5.0))
    gradclip.get_total_norm([p.grad for p in params])
    assert versions() == [0, 0, 0]
    gradclip.clip_grad_value_(params, 3.5)
    assert versions()[0] == 0 and versions()[1] > 0
    gradclip.clip_grad_norm_(params, 1.0)
    assert versions()[0] > 0


def test_by_tensor_and_policy():
    a, b = torch.tensor([3.0]), torch.tensor([0.5])
    gradclip.clip([a, b], max_norm=1.0, scope="tensor")
    assert a._version > 0 and b._version == 0
    for policy in ("skip", "error", "zero"):
        a, b = torch.tensor([3.0]), torch.tensor([float("nan")])
        try:
            gradclip.clip([a, b], clip_value=1.0, non_finite=policy)
        except gradclip.NonFiniteError as error:
            assert error.non_finite.tensor == 1
        assert (a._version > 0) == (policy == "zero")
        a, b = torch.tensor([3.0]), torch.tensor([0.5])
        gradclip.clip([a, b], clip_value=1.0, non_finite=policy)
        assert a._version > 0 and b._version == 0
    a, b = torch.tensor([3.0]), torch.tensor([0.5])
    gradclip.clip([a, b], max_norm=100.0, grad_scale=2.0)
    assert a._version > 0 and b._version > 0 and a == 1.5


def test_a_saved_tensor_raises():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    y = x * 1.0
    loss = (y * y).sum()
    # y is saved for the backward pass.
    gradclip.clip([y.detach()], max_norm=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_array_that_shares_memory_with_a_tensor():
    tensor = torch.tensor([3.0, 4.0])
    gradclip.clip([tensor.numpy()], max_norm=1.0)
    assert tensor.tolist() == pytest.approx([0.6, 0.8])
    assert np.array_equal(tensor.numpy(), tensor.detach().numpy())


def test_a_gradient_that_requires_grad_is_clipped_as_torch_does():
    x = torch.nn.Parameter(torch.tensor([3.0]))
    (x**3).sum().backward(create_graph=True)
    assert x.grad.requires_grad
    gradclip.clip_grad_norm_([x], 1.0)
    assert float(x.grad) == pytest.approx(1.0, rel=1e-5) and x.grad._version > 0


def test_inference_tensors_have_no_counter():
    with torch.inference_mode():
        tensor = torch.tensor([3.0, 4.0])
        gradclip.clip([tensor], max_norm=1.0)
    assert tensor.tolist() == pytest.approx([0.6, 0.8])
