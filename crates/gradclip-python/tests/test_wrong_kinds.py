"""Guards against what cannot be clipped: an exception of the right kind names it, and nothing is written."""

import io

import gradclip
import numpy as np
import pytest
import torch

GOOD = np.full(3, 7.0, np.float32)


class Hidden(torch.Tensor):
    """A tensor whose data lies elsewhere, as that of a DTensor does."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "bad, kind, message",
    [
        ("text", TypeError, "tensor 1 is a str"),
        (3, TypeError, "tensor 1 is an int"),
        (3.0, TypeError, "tensor 1 is a float"),
        ([1.0, [2.0]], TypeError, "tensor 1 is a list"),
        (object(), TypeError, "tensor 1 is an object"),
        (np.float32(3), TypeError, "tensor 1 is a float32"),
        (np.arange(3), TypeError, "tensor 1 is int64"),
        (np.array(["a"]), TypeError, "tensor 1 is str"),
        (np.zeros(2, np.complex64), TypeError, "tensor 1 is complex64"),
        (np.zeros(2, ">f4"), ValueError, "another byte order"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), TypeError, "masked"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "tensor 1 is int32"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "view_as_real"),
        (torch.zeros(2, device="meta"), TypeError, "meta tensor"),
        (torch.eye(2).to_sparse(), TypeError, "to_dense"),
        (torch.eye(2).to_sparse_csr(), TypeError, "to_dense"),
        (torch.zeros(2, requires_grad=True), ValueError, "requires grad"),
        (torch.zeros(2).as_subclass(Hidden), TypeError, "tensor 1 is a Hidden"),
    ],
)
def test_one_bad_tensor(bad, kind, message):
    good = GOOD.copy()
    with pytest.raises(kind, match=message):
        gradclip.clip([good, bad], max_norm=1.0)
    assert np.array_equal(good, GOOD)


def test_read_only_arrays_are_measured():
    array = np.array([3.0, 4.0], np.float32)
    array.flags.writeable = False
    assert float(gradclip.norm(array)) == 5.0
    with pytest.raises(ValueError, match="tensor 'w' is read-only"):
        gradclip.clip({"w": array}, max_norm=1.0)
    assert float(gradclip.norm([np.float32(3), np.float64(4)])) == 5.0


def test_others_arrays_are_measured_only():
    class Other:
        def __array__(self, dtype=None, copy=None):
            return np.array([3.0, 4.0], np.float32)

    assert float(gradclip.norm(Other())) == 5.0
    with pytest.raises(TypeError, match="only PyTorch tensors and NumPy arrays can be clipped in place"):
        gradclip.clip([Other()], max_norm=1.0)


def test_a_plain_subclass_is_a_tensor():
    tensor = torch.tensor([3.0, 4.0]).as_subclass(Subclass)
    assert gradclip.clip([tensor], max_norm=1.0).total_norm == 5.0
    assert tensor.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("tensors", ["file.safetensors", b"bytes", 3, None, {1: GOOD}, io.BytesIO(b"closed"), io.StringIO()])
def test_no_tensors(tensors):
    with pytest.raises(TypeError, match="tensors"):
        gradclip.clip(tensors, max_norm=1.0)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        ({}, ValueError, "one of them is needed"),
        ({"max_norm": 1.0, "clip_value": 1.0}, ValueError, "exclude each other"),
        ({"max_norm": -1.0}, ValueError, "max_norm is -1"),
        ({"max_norm": "much"}, ValueError, "max_norm must be a number"),
        ({"max_norm": [1.0, 2.0]}, TypeError, "max_norm must be a number"),
        ({"max_norm": 1.0, "norm_type": 0}, ValueError, "norm_type is 0"),
        ({"max_norm": 1.0, "scope": "layer"}, ValueError, 'scope is "layer"; it must be one of global'),
        ({"max_norm": 1.0, "non_finite": "ignore"}, ValueError, 'non_finite is "ignore"'),
        ({"max_norm": 1.0, "unit_axis": "first"}, ValueError, 'only scope="unit" uses it'),
        ({"max_norm": 1.0, "scope": "unit", "unit_axis": 5}, ValueError, "axis 5"),
        ({"max_norm": 1.0, "scope": "unit", "unit_axis": 1.5}, TypeError, "unit_axis must be"),
        ({"max_rms": 1.0, "eps": 1.0}, ValueError, "eps is 1; only max_norm uses it"),
        ({"clip_range": (2.0, 1.0)}, ValueError, "clip_range is 2 to 1"),
        ({"clip_range": 2.0}, TypeError, "clip_range must be two numbers"),
        ({"agc": 0.1}, ValueError, "agc needs the parameters"),
        ({"agc": 0.1, "params": []}, ValueError, "params has 0 tensors, and tensors has 1"),
        ({"max_norm": 1.0, "params": [GOOD]}, ValueError, "params goes with agc only"),
        ({"max_norm": 1.0, "groups": {"*": 1.0}}, ValueError, "groups goes by names"),
        ({"max_norm": 1.0, "only": "w"}, ValueError, "only and exclude goes by names"),
        ({"max_norm": 1.0, "threshold": 3}, TypeError, "threshold must be a ZClip"),
        ({"max_norm": 1.0, "given_norm": float("nan")}, ValueError, "a given norm is NaN"),
        ({"max_norm": 1.0, "backend": "tpu"}, ValueError, 'backend is "tpu"'),
        ({"max_norm": 1.0, "adapter": "x"}, ValueError, "adapter names a GPU"),
        ({"max_norm": 1.0, "max_nrom": 1.0}, TypeError, "max_nrom"),
        ({"max_norm": 1.0, "grad_scale": 0.0}, ValueError, "grad_scale is 0"),
    ],
)
def test_bad_settings(arguments, kind, message):
    good = GOOD.copy()
    with pytest.raises(kind, match=message.replace("(", r"\(")):
        gradclip.clip([good], **arguments)
    assert np.array_equal(good, GOOD)


def test_bad_parameters():
    for parameters in ("text", 3, ["text"], [3.0]):
        with pytest.raises(TypeError, match="parameters"):
            gradclip.clip_grad_norm_(parameters, 1.0)
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    with pytest.raises(ValueError):
        gradclip.clip_grad_norm_([param], "much")
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="gradient 0 is sparse"):
        gradclip.clip_grad_norm_(embedding.parameters(), 1.0)


def test_patterns_that_fit_nothing():
    tensors = {"a.weight": GOOD.copy(), "a.bias": GOOD.copy()}
    for arguments in ({"only": "b.*"}, {"exclude": ["*", "c"]}, {"groups": {"b": 1.0}}, {"groups": {"*": 1.0, "a.*": 2.0}}):
        with pytest.raises(ValueError, match="no tensor has this name"):
            gradclip.clip(tensors, max_norm=1.0, **arguments)
    assert all(np.array_equal(t, GOOD) for t in tensors.values())
