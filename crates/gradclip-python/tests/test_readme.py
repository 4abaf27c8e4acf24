"""Guards against a README whose lines do not run."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_block_runs_and_prints_what_its_comments_say(block, capsys):
    exec(compile(block, str(PAGE), "exec"), {"__name__": "readme"})
    said = [line.partition("  # ")[2] for line in block.splitlines() if line.lstrip().startswith("print(")]
    printed = capsys.readouterr().out.splitlines()
    assert len(said) == len(printed)
    for expected, line in zip(said, printed):
        assert line.startswith(expected.strip().rstrip(".").rstrip()), (expected, line)


def test_there_are_recipes():
    assert len(BLOCKS) >= 9
