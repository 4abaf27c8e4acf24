"""Guards against reports that do not tell what happened."""

import math

import gradclip
import pytest
import torch


def test_a_report_prints_in_one_line():
    report = gradclip.clip({"w": torch.tensor([3.0, 4.0])}, max_norm=1.0)
    assert repr(report) == "Report(total_norm=5, clip_coef=0.19999996, clipped=True, elements=2, tensors=1)"
    assert float(report) == 5.0


def test_a_nan_is_told_by_name_everywhere():
    tensors = {"fine": torch.ones(3), "<b>": torch.tensor([1.0, math.nan])}
    report = gradclip.norm(tensors, scope="tensor")
    assert "the first at index 1 of tensor '<b>'" in repr(report)
    page = report._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and page.startswith("<table>") and "nan" in page


def test_dicts_are_flat_numbers():
    report = gradclip.clip({"a.w": torch.ones(4), "b.w": torch.ones(4)}, max_norm=1.0, scope="tensor")
    found = report.to_dict("grad/")
    assert found["grad/norm/a.w"] == 2.0 and found["grad/clipped"] == 1 and found["grad/non_finite"] == 0
    assert all(isinstance(value, (int, float)) for value in found.values())
    grouped = gradclip.clip({"a.w": torch.ones(4), "b.w": torch.ones(4)}, max_norm=1.0, groups={"a.*": 5.0})
    assert grouped.to_dict()["norm/a.*"] == 2.0 and grouped.to_dict()["norm/rest"] == 2.0


def test_what_rounding_lost():
    half = torch.full((4,), 1e-7, dtype=torch.float16)
    report = gradclip.clip([half], max_norm=1.0, grad_scale=65536.0)
    assert report.lost == gradclip.Lost(zero=4, infinite=0) and "zero=4" in repr(report)


def test_reports_are_values():
    make = lambda: gradclip.clip([torch.ones(4)], max_norm=1.0)  # noqa: E731
    assert make() == make()
    with pytest.raises(AttributeError):
        make().total_norm = 3.0
