"""Guards against ranks that disagree: on the norm, on what is written, on who has failed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import gradclip
import pytest
import torch
import torch.distributed

WITH_DTENSORS = pytest.mark.skipif(
    importlib.util.find_spec("torch.distributed.tensor") is None, reason="DTensor is public since PyTorch 2.5"
)
ENTRY = Path(__file__).with_name("ranks.py")

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


def ranks(name, count, folder):
    """Run functions of ranks.py in so many processes, and return what each prints."""
    started = [
        subprocess.Popen(
            [sys.executable, str(ENTRY), name, str(rank), str(count), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    printed = [process.communicate(timeout=300) for process in started]
    for process, (_, told) in zip(started, printed):
        assert process.returncode == 0, told
    return [out for out, _ in printed]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["plain", pytest.param("dtensors", marks=WITH_DTENSORS)])
def test_all_ranks_alike(name, count, tmp_path):
    printed = ranks(name, count, tmp_path)
    assert len(set(printed)) == 1 and len(printed[0].splitlines()) > 1


def test_no_group():
    for group in ("gloo", 3):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            gradclip.clip([torch.ones(2)], max_norm=1.0, group=group)
