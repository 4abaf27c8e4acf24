"""Guards against thresholds that forget, or that take any state."""

import copy
import json
import pickle

import gradclip
import numpy as np
import pytest
import torch

MADE = [
    lambda: gradclip.ZClip(warm_up=3, alpha=0.9),
    lambda: gradclip.AutoClip(percentile=50.0, history=10),
    lambda: gradclip.AdaGC(warm_up=2, lambda_rel=1.1),
]


def step(threshold, size):
    tensors = {"w": np.full(4, size, np.float32), "b": np.full(2, size / 2, np.float32)}
    scope = "tensor" if isinstance(threshold, gradclip.AdaGC) else None
    gradclip.clip(tensors, max_norm=float("inf"), eps=0.0, scope=scope, threshold=threshold)
    return [a.tolist() for a in tensors.values()]


@pytest.mark.parametrize("make", MADE)
@pytest.mark.parametrize("through", [pickle, json, copy, torch])
def test_a_saved_threshold_goes_on_to_the_bit(make, through, tmp_path):
    threshold = make()
    for size in (1.0, 3.0, 1.0, 3.0, 2.0):
        step(threshold, size)
    if through is pickle:
        again = pickle.loads(pickle.dumps(threshold))
    elif through is json:
        again = make()
        again.load_state_dict(json.loads(json.dumps(threshold.state_dict())))
    elif through is copy:
        again = copy.deepcopy(threshold)
    else:
        torch.save({"threshold": threshold.state_dict()}, tmp_path / "checkpoint.pt")
        again = make()
        again.load_state_dict(torch.load(tmp_path / "checkpoint.pt")["threshold"])
    assert again == threshold and repr(again) == repr(threshold)
    for size in (50.0, 0.5, 4.0):
        assert step(again, size) == step(threshold, size)
        assert again == threshold
    step(again, 1.0)
    assert again != threshold


def test_a_spike_is_clipped():
    threshold = gradclip.ZClip(warm_up=4)
    for size in (1.0, 3.0, 1.0, 3.0):
        step(threshold, size)
    assert max(step(threshold, 100.0)[0]) < 10.0


def test_damaged_states_and_bad_settings():
    threshold = gradclip.ZClip(warm_up=3)
    step(threshold, 1.0)
    before = threshold.state_dict()
    for change in ({"mean": "nan"}, {"version": 99}, {"alpha": "2"}, {"steps": -1}):
        with pytest.raises(ValueError):
            threshold.load_state_dict({**before, **change})
    assert threshold.state_dict() == before
    for arguments in ({"alpha": 1.0}, {"warm_up": 0}, {"z_threshold": -1.0}, {"skip_above_z": 0.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            gradclip.ZClip(**arguments)
    with pytest.raises(TypeError):
        gradclip.ZClip(beta=1.0)


def test_the_state_belongs_to_its_tensors():
    threshold = MADE[2]()
    step(threshold, 1.0)
    with pytest.raises(ValueError, match="the threshold's state does not fit"):
        gradclip.clip({"other": np.ones(4)}, max_norm=float("inf"), scope="tensor", threshold=threshold)
    with pytest.raises(ValueError, match="follows one norm"):
        gradclip.clip([np.ones(2), np.ones(2)], max_norm=1.0, scope="tensor", threshold=gradclip.ZClip())


def test_a_skipped_step_does_not_enter():
    threshold = gradclip.ZClip(warm_up=4, skip_above_z=3.0)
    for size in (1.0, 3.0, 1.0, 3.0):
        step(threshold, size)
    before = threshold.state_dict()
    array = np.full(4, 1e6, np.float32)
    report = gradclip.clip([array], max_norm=float("inf"), threshold=threshold)
    assert report.skipped == "above" and array[0] == 1e6 and threshold.state_dict() == before
