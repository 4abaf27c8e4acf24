"""Guards against files that are half written, and against errors that do not say which file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gradclip
import numpy as np
import pytest

DATA = Path(__file__).parents[3] / "examples/data"
GRADS, NAN = DATA / "lstm_grads.safetensors", DATA / "nan_grads.safetensors"


def read(path):
    """The tensors of a safetensors file, all float32."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    header.pop("__metadata__", None)
    return {name: np.frombuffer(body[slice(*about["data_offsets"])], np.float32) for name, about in header.items()}


def test_norm():
    memory = gradclip.norm(read(GRADS))
    for path in (GRADS, str(GRADS)):
        report = gradclip.norm(path)
        assert report.total_norm == memory.total_norm and report.elements == memory.elements
    by_tensor = gradclip.norm(GRADS, scope="tensor", norm_type="inf", only="rnn.*")
    expected = gradclip.norm(read(GRADS), scope="tensor", norm_type="inf", only="rnn.*")
    assert [(s.name, s.norm) for s in by_tensor.segments] == [(s.name, s.norm) for s in expected.segments]
    report = gradclip.norm(NAN)
    assert report.non_finite.name == "rnn.weight_ih_l1" and report.non_finite.index == 4321
    assert report.total_norm != report.total_norm


def test_clip_file(tmp_path):
    out = tmp_path / "out.safetensors"
    report = gradclip.clip_file(GRADS, out, max_norm=0.2)
    expected = read(GRADS)
    expected = {name: array.copy() for name, array in expected.items()}
    assert gradclip.clip(expected, max_norm=0.2).clip_coef == report.clip_coef
    for name, array in read(out).items():
        assert np.array_equal(array, expected[name])
    with pytest.raises(gradclip.FileError, match="exists already"):
        gradclip.clip_file(GRADS, out, max_norm=0.2)
    gradclip.clip_file(GRADS, out, clip_range=(-0.01, 0.02), force=True)
    assert max(array.max() for array in read(out).values()) == np.float32(0.02)
    report = gradclip.clip_file(GRADS, out, max_norm=0.2, groups={"rnn.*": 0.1}, force=True)
    assert set(report.groups) == {"rnn.*", "rest"}
    gradclip.clip_file(
        GRADS, out, agc=0.01, params=GRADS, scope="unit", unit_axis=("over", [-1]), only="*weight*", force=True
    )


def test_errors_name_the_file_and_nothing_is_written(tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(gradclip.NonFiniteError, match="index 4321 of tensor"):
        gradclip.clip_file(NAN, out, max_norm=1.0)
    with pytest.raises(gradclip.FileError, match="missing.safetensors"):
        gradclip.norm(tmp_path / "missing.safetensors")
    cut = tmp_path / "-cut.safetensors"
    cut.write_bytes(GRADS.read_bytes()[:1000])
    with pytest.raises(gradclip.FileError, match="cut.safetensors"):
        gradclip.clip_file(cut, out, max_norm=1.0)
    for arguments in ({}, {"max_norm": -1.0}, {"max_norm": 1.0, "clip_value": 1.0}, {"max_norm": 1.0, "only": "nothing"}):
        with pytest.raises(ValueError):
            gradclip.clip_file(GRADS, out, **arguments)
    with pytest.raises(TypeError):
        gradclip.clip_file(3, out, max_norm=1.0)
    with pytest.raises(TypeError):
        gradclip.clip_file(GRADS, out, max_norm=1.0, colour="red")
    with pytest.raises(ValueError, match="needs no mode"):
        gradclip.norm(GRADS, max_norm=1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["-cut.safetensors"]


def test_history(tmp_path):
    for step in (1, 2, 10):
        shutil.copy(GRADS, tmp_path / f"step{step}.safetensors")
    steps = gradclip.history(tmp_path.glob("*.safetensors"), groups=["rnn.*", "*"])
    assert [step["step"] for step in steps] == [1, 2, 10]
    total = gradclip.norm(GRADS).total_norm
    assert all(any(value == total for value in step.values()) for step in steps)
    with pytest.raises(TypeError, match="iterable of paths"):
        gradclip.history("step1.safetensors")


def test_progress(capfd):
    assert gradclip.norm(GRADS, progress=True).elements == gradclip.norm(GRADS).elements
    assert "measuring" in capfd.readouterr().err
    gradclip.norm(GRADS)
    assert capfd.readouterr().err == ""


def test_the_program():
    run = [sys.executable, "-m", "gradclip"]
    out = subprocess.run([*run, "norm", str(GRADS), "--quiet"], capture_output=True, text=True, check=True)
    assert float(out.stdout) == gradclip.norm(GRADS).total_norm
    out = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"gradclip {gradclip.__version__}\n"
    assert subprocess.run([*run, "norm"], capture_output=True).returncode == 2
    assert subprocess.run([*run, "clip", str(NAN), "-o", "out", "--max-norm", "1"], capture_output=True).returncode == 3


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_leaves_no_file(tmp_path):
    big = tmp_path / "big.safetensors"
    count = 1 << 26
    header = json.dumps({"g": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}).encode()
    with big.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * count)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(1000):
                gradclip.clip_file(big, tmp_path / "out.safetensors", max_norm=1.0, grad_scale=2.0, force=True)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"big.safetensors", "out.safetensors"}
