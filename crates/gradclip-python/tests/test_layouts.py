"""Guards against layouts: strides, gaps, overlaps."""

import gradclip
import numpy as np
import pytest
import torch


def layouts():
    base = torch.arange(1.0, 25.0)
    yield "channels last", base.clone().view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last), True
    yield "transposed", base.clone().view(4, 6).t(), True
    yield "permuted", base.clone().view(2, 3, 4).permute(2, 0, 1), True
    yield "gaps", base.clone().view(12, 2)[:, 0], False
    yield "columns", base.clone().view(4, 6)[:, :3], False
    yield "a view that starts later", base.clone()[5:], True
    yield "size 1 with any stride", base.clone().as_strided((1, 24), (1000, 1)), True


@pytest.mark.parametrize("name, tensor, dense", list(layouts()))
def test_layouts_of_torch(name, tensor, dense):
    before, address, strides = tensor.clone(), tensor.data_ptr(), tensor.stride()
    whole = torch.as_strided(tensor, (24,), (1,), 0)
    outside = whole.clone()
    report = gradclip.clip([tensor], max_norm=1.0)
    assert report.total_norm == pytest.approx(float(before.double().norm()), rel=1e-12)
    assert torch.allclose(tensor, before / before.norm(), rtol=1e-5)
    assert tensor.data_ptr() == address and tensor.stride() == strides
    # What lies between the elements stays.
    assert int((whole != outside).sum()) == tensor.numel()
    assert tensor._version > 0


@pytest.mark.parametrize("unit_axis", ["first", "last"])
@pytest.mark.parametrize("name, tensor, dense", list(layouts()))
def test_units_go_by_dimensions_and_not_by_memory(name, tensor, dense, unit_axis):
    if tensor.dim() < 2:
        return
    dims = list(range(tensor.dim()))
    dims.remove(0 if unit_axis == "first" else tensor.dim() - 1)
    norms = torch.linalg.vector_norm(tensor.double(), dim=dims)
    report = gradclip.clip([tensor], max_norm=1.0, scope="unit", unit_axis=unit_axis)
    assert [s.norm for s in report.segments] == pytest.approx(norms.tolist(), rel=1e-12)
    after = torch.linalg.vector_norm(tensor.double(), dim=dims)
    assert torch.allclose(after, norms.clamp(max=1.0), rtol=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.reshape(4, 6).T,
        lambda base: np.asfortranarray(base.reshape(4, 6)),
        lambda base: base[::2],
        lambda base: base[::-1],
        lambda base: base.reshape(4, 6)[:, 1:3],
        lambda base: base.reshape(2, 3, 4).transpose(2, 0, 1),
    ],
)
def test_layouts_of_numpy(view):
    array = view(np.arange(1.0, 25.0, dtype=np.float32))
    before = array.copy()
    report = gradclip.clip([array], max_norm=1.0)
    norm = np.linalg.norm(before.astype(np.float64).ravel())
    assert report.total_norm == pytest.approx(norm, rel=1e-12)
    assert np.allclose(array, before / norm, rtol=1e-5)


def test_elements_that_share_memory_are_refused():
    expanded = torch.ones(1).expand(5)
    windows = torch.ones(6).as_strided((3, 4), (1, 1))
    broadcast = np.broadcast_to(np.ones(1, np.float32), (5,))
    for tensor in (expanded, windows):
        with pytest.raises(ValueError, match="share memory"):
            gradclip.clip([torch.ones(2), tensor], max_norm=0.1)
    with pytest.raises(ValueError, match="tensor 1 is read-only"):
        gradclip.clip([torch.ones(2), broadcast], max_norm=0.1)
    assert expanded.tolist() == [1.0] * 5 and windows.sum() == 12
    # They can be measured.
    assert float(gradclip.norm([expanded])) == pytest.approx(5**0.5)
    assert float(gradclip.norm([broadcast])) == pytest.approx(5**0.5)


def test_tensors_that_share_memory_are_refused():
    base = torch.ones(10)
    for tensors in ([base, base], [base[:6], base[5:]], [base[2:4], base], {"a": base.numpy(), "b": base}):
        with pytest.raises(ValueError, match="shares elements with tensor"):
            gradclip.clip(tensors, max_norm=0.1)
    assert base.tolist() == [1.0] * 10
    gradclip.clip([base[:5], base[5:], base[5:5]], max_norm=1.0)
    assert base.norm() == pytest.approx(1.0, rel=1e-5)
    grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="shares elements"):
        gradclip.clip([grad], agc=0.1, params=[grad])


@pytest.mark.parametrize("numbers", [[3.0 + 4.0j, 5.0 + 12.0j], [3.0 + 4.0j]])
def test_a_negated_view(numbers):
    view = torch.tensor(numbers).conj().imag
    if not view.is_neg():
        pytest.skip("this version negates at once")
    gradclip.clip([view], clip_range=(-1.0, 2.0))
    assert view.tolist() == [-1.0] * len(numbers)


def test_alignment():
    raw = np.zeros(4 * 8 + 1, np.uint8)
    array = raw[1:].view(np.float32)
    array[:] = 3.0
    report = gradclip.clip([array], max_norm=1.0)
    assert report.total_norm == pytest.approx(3 * 8**0.5)
