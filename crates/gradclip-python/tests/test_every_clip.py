"""Guards against a clip that Python asks for and the library does not do: modes, scopes, policies, names, dtypes."""

import importlib.util
import math
import subprocess
import sys

import gradclip
import numpy as np
import pytest
import torch


def made(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"embed.weight": (6, 4), "layer.weight": (6, 3, 2), "layer.bias": (6,), "scale": (6,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def norm(arrays, p=2.0):
    return float(np.linalg.norm(np.concatenate([np.ravel(a).astype(np.float64) for a in arrays]), p))


def check(tensors, expected, **arguments):
    """The same through NumPy, through PyTorch and by names or not."""
    for make in (lambda a: a.copy(), lambda a: torch.tensor(a)):
        for named in (True, False):
            copies = {name: make(a) for name, a in tensors.items()}
            report = gradclip.clip(copies if named else list(copies.values()), **arguments)
            for name, copy in copies.items():
                assert np.allclose(np.asarray(copy), expected[name], rtol=3e-6, atol=1e-30), name
    return report


@pytest.mark.parametrize("p", [2, 1.0, "inf", 3.5])
def test_by_norm(p):
    tensors = made()
    total = norm(tensors.values(), float(p))
    expected = {name: a * (0.5 / total) for name, a in tensors.items()}
    report = check(tensors, expected, max_norm=0.5, norm_type=p, eps=0.0)
    assert report.total_norm == pytest.approx(total, rel=1e-12) and report.clipped


def test_rms_average_and_scale():
    tensors = made()
    total, count = norm(tensors.values()), sum(a.size for a in tensors.values())
    expected = {name: a * (0.1 / (total / count**0.5)) for name, a in tensors.items()}
    assert check(tensors, expected, max_rms=0.1).total_norm == pytest.approx(total / count**0.5)
    expected = {name: a * (0.01 / (total / count)) for name, a in tensors.items()}
    assert check(tensors, expected, max_average_norm=0.01).total_norm == pytest.approx(total / count)
    expected = {name: a / 8 for name, a in tensors.items()}
    assert not check(tensors, expected, max_norm=math.inf, grad_scale=8.0).clipped


def test_value_and_range():
    tensors = made()
    check(tensors, {name: a.clip(-0.5, 0.5) for name, a in tensors.items()}, clip_value=0.5)
    check(tensors, {name: a.clip(-0.1, 0.7) for name, a in tensors.items()}, clip_range=(-0.1, 0.7))
    expected = {name: a.clip(-0.5, 0.5) for name, a in tensors.items()}
    report = check(tensors, expected, clip_value=0.5, report_norm=True)
    assert report.total_norm == pytest.approx(norm(tensors.values()))
    groups = {"*.weight": 0.5}
    report = gradclip.clip({n: a.copy() for n, a in tensors.items()}, clip_value=1.0, report_norm=True, groups=groups)
    assert report.total_norm == pytest.approx(norm(tensors.values()))
    with pytest.raises(ValueError, match="report_norm"):
        gradclip.clip([np.ones(2, np.float32)], max_norm=1.0, report_norm=True)


def test_scopes():
    tensors = made()
    clip = lambda a, n: a * np.minimum(1.0, 0.5 / n)  # noqa: E731
    report = check(tensors, {name: clip(a, norm([a])) for name, a in tensors.items()}, max_norm=0.5, scope="tensor", eps=0.0)
    assert len(report.segments) == 4 and report.num_clipped == 4
    rows = {n: np.sqrt((a**2).sum(tuple(range(1, a.ndim)), keepdims=True)) for n, a in tensors.items()}
    units = {n: clip(a, rows[n] if a.ndim > 1 else norm([a])) for n, a in tensors.items()}
    check(tensors, units, max_norm=0.5, scope="unit", eps=0.0)
    for axis in (0, [0], ("over", [1, 2]), "optax"):
        only = {"layer.weight": tensors["layer.weight"]}
        gradclip.clip({n: a.copy() for n, a in only.items()}, max_norm=0.5, scope="unit", unit_axis=axis)
    examples = np.sqrt(sum((a.astype(np.float64).reshape(6, -1) ** 2).sum(1) for a in tensors.values()))
    shaped = {n: examples.reshape(-1, *[1] * (a.ndim - 1)) for n, a in tensors.items()}
    report = check(tensors, {n: clip(a, shaped[n]) for n, a in tensors.items()}, max_norm=0.5, scope="example", eps=0.0)
    assert [s.norm for s in report.segments] == pytest.approx(examples)
    each = {n: np.sqrt((a.reshape(6, -1) ** 2).sum(1)).reshape(-1, *[1] * (a.ndim - 1)) for n, a in tensors.items()}
    halved = {n: a * np.minimum(1.0, 0.25 / each[n]) for n, a in tensors.items()}
    check(tensors, halved, max_norm=0.5, scope="example-tensor", budget="uniform", eps=0.0)


def test_sum_examples():
    tensors = made()
    examples = np.sqrt(sum((a.astype(np.float64).reshape(6, -1) ** 2).sum(1) for a in tensors.values()))
    coefs = np.minimum(1.0, 0.5 / examples)
    before = {n: a.copy() for n, a in tensors.items()}
    report, sums = gradclip.sum_examples(tensors, max_norm=0.5, eps=0.0)
    assert report.num_clipped == (coefs < 1).sum()
    for name, a in tensors.items():
        expected = (a * coefs.reshape(-1, *[1] * (a.ndim - 1))).sum(0)
        assert np.allclose(sums[name], expected, rtol=1e-5, atol=1e-7) and sums[name].dtype == np.float32
        assert np.array_equal(a, before[name])
    _, sums = gradclip.sum_examples([torch.ones(3, 2, dtype=torch.bfloat16)], max_norm=1.0, eps=0.0)
    assert sums[0].dtype == torch.float32 and sums[0].tolist() == pytest.approx([3 * 0.5**0.5] * 2)
    with pytest.raises(ValueError, match="scalar"):
        gradclip.sum_examples([torch.tensor(1.0)], max_norm=1.0)


def test_agc():
    rng = np.random.default_rng(1)
    grads, params = made(2), {n: a * 0.1 for n, a in made(3).items()}
    expected = {}
    for name, g in grads.items():
        axes = tuple(range(1, g.ndim)) or None
        of = lambda a: np.sqrt((a.astype(np.float64) ** 2).sum(axes, keepdims=True))  # noqa: E731, B023
        most = 0.05 * np.maximum(of(params[name]), 1e-3)
        expected[name] = np.where(of(g) < most, g, g * most / np.maximum(of(g), 1e-6))
    copies = {n: a.copy() for n, a in grads.items()}
    gradclip.clip(copies, agc=0.05, params={n: params[n] for n in reversed(list(params))})
    assert all(np.allclose(copies[n], expected[n], rtol=1e-5) for n in copies)
    module = torch.nn.Linear(3, 2)
    for p in module.parameters():
        p.grad = torch.tensor(rng.normal(size=tuple(p.shape)), dtype=torch.float32)
    report = gradclip.clip(module, agc=0.01)
    assert report.clipped and [s.name for s in report.segments] == ["weight[0]", "weight[1]", "bias"]


@pytest.mark.parametrize("policy", ["error", "propagate", "skip", "zero", "drop"])
def test_policies(policy):
    arrays = {"a": np.array([3.0, np.nan, 4.0], np.float32), "b": np.array([np.inf, 0.0], np.float32)}
    before = {n: a.copy() for n, a in arrays.items()}
    if policy == "error":
        with pytest.raises(
            gradclip.NonFiniteError, match='2 non-finite elements, the first at index 1 of tensor "a"'
        ) as raised:
            gradclip.clip(arrays, max_norm=1.0)
        assert raised.value.non_finite == gradclip.NonFinite(2, 0, "a", 1)
        found = None
    else:
        report = gradclip.clip(arrays, max_norm=1.0, non_finite=policy, eps=0.0)
        found = report.non_finite
        assert found == gradclip.NonFinite(2, 0, "a", 1)
        assert report.skipped == ("non-finite" if policy == "skip" else None)
    expected = {
        "propagate": ([np.nan] * 3, [np.nan] * 2),
        "zero": ([0.0] * 3, [0.0] * 2),
        "drop": ([0.6, 0.0, 0.8], [0.0, 0.0]),
    }.get(policy, (before["a"], before["b"]))
    for array, values in zip(arrays.values(), expected):
        assert np.allclose(array, values, equal_nan=True)


def test_places_are_those_of_the_list_that_was_given():
    tensors = [None, torch.ones(2), None, torch.tensor([1.0, math.nan])]
    with pytest.raises(gradclip.NonFiniteError, match="index 1 of tensor 3;") as raised:
        gradclip.clip(tensors, max_norm=1.0)
    assert raised.value.non_finite.tensor == 3
    report = gradclip.norm(tensors, scope="tensor")
    assert report.non_finite.tensor == 3 and [s.name for s in report.segments] == ["1", "3"]


def test_skips():
    array = np.array([30.0, 40.0], np.float32)
    skips = gradclip.ConsecutiveSkips(2)
    report = gradclip.clip([array], max_norm=1.0, skip_above=49.0)
    assert report.skipped == "above" and array.tolist() == [30.0, 40.0]
    skips.count(report)
    with pytest.raises(gradclip.SkippedError, match="2 steps in a row"):
        skips.count(report)
    assert gradclip.clip([array], max_norm=1.0, skip_above=50.0).skipped is None


def test_names():
    tensors = made()
    copies = {n: a.copy() for n, a in tensors.items()}
    report = gradclip.clip(copies, max_norm=0.5, only="layer.*", exclude="*.bias")
    assert report.total_norm == pytest.approx(norm([tensors["layer.weight"]])) and report.tensors == 1
    assert [n for n in tensors if not np.array_equal(tensors[n], copies[n])] == ["layer.weight"]
    copies = {n: a.copy() for n, a in tensors.items()}
    report = gradclip.clip(copies, max_norm=0.5, groups={"layer.*": 0.25, "*.weigh?": 1000.0})
    assert list(report.groups) == ["layer.*", "*.weigh?", ""]
    assert norm([copies["layer.weight"], copies["layer.bias"]]) == pytest.approx(0.25, rel=1e-5)
    assert np.array_equal(copies["embed.weight"], tensors["embed.weight"])
    assert norm([copies["scale"]]) == pytest.approx(0.5, rel=1e-5)
    assert report.total_norm == pytest.approx(norm(tensors.values()))
    copies["scale"][3] = np.nan
    with pytest.raises(gradclip.NonFiniteError) as raised:
        gradclip.clip(copies, max_norm=0.5, groups={"layer.*": 0.25})
    assert raised.value.non_finite == gradclip.NonFinite(1, 3, "scale", 3)
    report = gradclip.clip(copies, max_norm=0.5, groups={"layer.*": 0.25}, non_finite="propagate")
    assert report.non_finite == gradclip.NonFinite(1, 3, "scale", 3)


def test_mixed_dtypes_in_one_call():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = [np.full(3, 2.0, dtype) for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
    arrays.append(torch.full((3,), 2.0, dtype=torch.bfloat16))
    report = gradclip.clip(arrays, max_norm=15**0.5, eps=0.0)
    assert report.total_norm == pytest.approx(60**0.5, rel=1e-12)
    assert all(
        np.array_equal(np.asarray(a, np.float64) if isinstance(a, np.ndarray) else a.double().numpy(), np.ones(3))
        for a in arrays
    )
    with pytest.raises(TypeError, match="float8"):
        gradclip.clip([np.zeros(2, ml_dtypes.float8_e4m3fn)], max_norm=1.0)


def test_given_norm_and_measuring_with_a_mode():
    array = np.array([3.0], np.float32)
    gradclip.clip(array, max_norm=1.0, given_norm=torch.tensor(5.0), eps=0.0)
    assert array[0] == np.float32(0.6)
    report = gradclip.norm([np.array([3.0, 4.0], np.float32)], max_norm=1.0, eps=0.0)
    assert report.clip_coef == 0.2 and report.clipped


def test_empty():
    for tensors in ([], {}, torch.nn.Linear(2, 2), [None], np.zeros((0, 3), np.float32)):
        report = gradclip.clip(tensors, max_norm=1.0)
        assert report.total_norm == 0.0 and not report.clipped
        assert float(gradclip.norm(tensors)) == 0.0
        assert not gradclip.clip(tensors, clip_value=1.0).clipped


def test_gpu():
    tensors = made()
    total = norm(tensors.values())
    try:
        verified = gradclip.verify(tensors, max_norm=0.5)
    except gradclip.DeviceError as error:
        pytest.skip(str(error))
    assert verified and verified.first_mismatch is None and verified.elements == 72
    report = gradclip.clip(tensors, max_norm=0.5, backend="gpu")
    assert report.total_norm == pytest.approx(total, rel=1e-6)
    assert norm(tensors.values()) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="float64"):
        gradclip.clip([np.ones(2)], max_norm=0.5, backend="gpu")
    with pytest.raises(gradclip.DeviceError):
        gradclip.clip(tensors, max_norm=0.5, backend="gpu", adapter="no such adapter")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_triton_can_be_loaded_after_a_gpu_was_used():
    code = """if True:
        import gradclip, numpy
        try:
            gradclip.verify([numpy.ones(5, numpy.float32)], max_norm=1.0)
        except gradclip.DeviceError:
            pass
        import torch, triton
    """
    subprocess.run([sys.executable, "-c", code], check=True)
