"""Safetensors files, through the program.

The program runs in a process of its own, because it takes over signals: an interrupt removes its unfinished files, and a
mapped file that shrinks is an error and no crash.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from gradclip._gradclip import NonFiniteError
from gradclip._report import Lost, NonFinite, Report, Segment
from gradclip._settings import MODES, OTHERS, Settings, mode_of, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

PathLike = str | os.PathLike[str]


class FileError(OSError):
    """A file cannot be read or written, or its contents are wrong. No file has been written."""


def norm(
    path: PathLike, *, only: Any, exclude: Any, backend: str, adapter: str | None, progress: bool, **settings: Any
) -> Report:
    """Measure a file: see gradclip.norm."""
    if any(settings.get(name) is not None for name in MODES):
        raise ValueError("the norm of a file needs no mode: leave out " + mode_of(settings))
    command = ["norm", _path(path), "--json", *_selection(only, exclude), *_settings(settings), *_backend(backend, adapter)]
    return _report(_run(command, progress)[0])


def clip_file(
    source: PathLike,
    destination: PathLike,
    *,
    params: PathLike | None = None,
    groups: Mapping[str, float] | None = None,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    given_norm: float | None = None,
    sum_examples: bool = False,
    out_dtype: Literal["float32"] | None = None,
    verify: bool = False,
    force: bool = False,
    backend: Literal["auto", "cpu", "gpu"] = "auto",
    adapter: str | None = None,
    threads: int | None = None,
    progress: bool = False,
    **settings: Unpack[Settings],
) -> Report:
    """Clip the gradients of a safetensors file into another, which appears whole or not at all.

    ``source``: a safetensors file, or a sharded set's ``*.safetensors.index.json``. It may be larger than memory. ``destination``:
    the new file, or for a set the new index. ``force`` replaces one that exists. What is no gradient passes through.
    ``params``: for ``agc``, the file of the parameters. ``sum_examples``: write the sums of the clipped examples.
    ``out_dtype="float32"``: widen half-precision gradients before the clip.
    ``verify``: compare GPU and CPU before anything is written. ``progress``: show it, by tqdm if that is there. The other arguments are those of :func:`gradclip.clip`.

    Raises FileError, ValueError for arguments that make no sense, and NonFiniteError under ``non_finite="error"``.
    """
    mode_of(settings)
    command = ["clip", _path(source), "--out", _path(destination), "--json", *_selection(only, exclude)]
    command += [*_settings(settings), *_backend(backend, adapter)]
    for pattern, threshold in (groups or {}).items():
        command.append(f"--group={pattern}={number('groups', threshold)!r}")
    norm = None if given_norm is None else repr(number("given_norm", given_norm))
    options = {"params": params and _path(params), "given-norm": norm, "out-dtype": out_dtype, "threads": threads}
    command += [f"--{option}={value}" for option, value in options.items() if value is not None]
    flags = {"sum": sum_examples, "verify": verify, "force": force}
    command += [f"--{flag}" for flag, given in flags.items() if given]
    return _report(_run(command, progress)[0])


def history(
    files: Iterable[PathLike],
    *,
    groups: str | Iterable[str] | None = None,
    levels: int | None = None,
    norm_type: float | str | None = None,
    spike: float | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Norms over the steps of a run: a dict of numbers for each step, in order, ready for a logger.

    ``files``: safetensors files or indexes, one a step with the step's number last in its name, or logs of
    ``gradclip norm --append``. ``groups``: patterns of names; without them a group is the first ``levels`` (2) levels of a name.
    ``spike``: the z-score above which a norm is a spike. ``progress``: show it, by tqdm if that is there.
    """
    if isinstance(files, (str, os.PathLike)):
        raise TypeError("files must be an iterable of paths, one for each step")
    command = ["history", "--json", *[_path(file) for file in files]]
    patterns = [groups] if isinstance(groups, str) else list(groups or [])
    command += [f"--group={pattern}" for pattern in patterns]
    for option, value in (("levels", levels), ("norm-type", norm_type), ("spike", spike), ("threads", threads)):
        if value is not None:
            command.append(f"--{option}={value}")
    return _run(command, progress)


def _path(path: PathLike) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"a path must be str or os.PathLike, not {type(path).__name__}")
    # Not an option.
    return os.path.join(os.curdir, text) if text.startswith("-") else text


def _selection(only: Any, exclude: Any) -> list[str]:
    found = []
    for option, patterns in (("only", only), ("except", exclude)):
        listed = [patterns] if isinstance(patterns, str) else list(patterns or [])
        found += [f"--{option}={pattern}" for pattern in listed]
    return found


def _backend(backend: str, adapter: str | None) -> list[str]:
    # As in memory, a GPU is used if it is asked for.
    chosen = [f"--backend={'cpu' if backend == 'auto' and adapter is None else backend}"]
    return chosen if adapter is None else [*chosen, f"--adapter={adapter}"]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    found = []
    for name in (*MODES, *OTHERS):
        value = settings.get(name)
        if value is None or (name == "grad_scale" and value == 1.0):
            continue
        if name == "report_norm":
            found += ["--report-norm"] if value else []
            continue
        if name == "clip_range":
            text = ",".join(repr(number(name, bound)) for bound in value)
        elif name == "unit_axis":
            text = _axes(value)
        elif name in ("scope", "budget", "non_finite"):
            text = str(value)
        else:
            text = repr(number(name, value))
        found.append(f"--{name.replace('_', '-')}={text}")
    return found


def _axes(axes: Any) -> str:
    if isinstance(axes, (str, int)):
        return str(axes)
    if len(axes) == 2 and axes[0] == "over":
        return "over:" + _axes(axes[1])
    return ",".join(str(axis) for axis in axes)


def _run(arguments: list[str], progress: bool = False) -> list[dict[str, Any]]:
    """What the program prints, an object a line."""
    import json
    import subprocess
    import tempfile

    if not sys.executable:
        raise FileError("this Python does not know its own program (sys.executable), which files need")
    environment = dict(os.environ)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    environment["GRADCLIP_PROGRESS"] = "lines" if progress else ""
    command = [sys.executable, "-m", "gradclip", *arguments]
    told = ""
    bars = _Bars()
    with tempfile.TemporaryFile() as out:
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE
        ) as process:
            try:
                for line in process.stderr or ():
                    text = line.decode(errors="replace")
                    if text.startswith("progress|"):
                        bars.show(*text.strip().split("|")[1:4])
                    else:
                        told += text
                process.wait()
            except BaseException:
                # It removes its unfinished files.
                process.terminate()
                raise
            finally:
                bars.close()
        if process.returncode == 0:
            out.seek(0)
            return [json.loads(line) for line in out]
    message = told.strip().rpartition("error: ")[2]
    if process.returncode == 2:
        raise ValueError(message)
    if process.returncode == 3:
        raise NonFiniteError(message)
    if process.returncode == 4:
        raise RuntimeError(message)
    raise FileError(message or f"the program ended with {process.returncode}")


class _Bars:
    """Bars of tqdm, one for each thing that is done in turn; without tqdm lines on stderr."""

    def __init__(self) -> None:
        self.doing = ""
        self.bar: Any = None

    def show(self, doing: str, done: str, total: str) -> None:
        if doing != self.doing:
            self.close()
            self.doing = doing
            try:
                from tqdm.auto import tqdm

                self.bar = tqdm(total=int(total), desc=doing, unit_scale=True)
            except ImportError:
                print(f"{doing} ...", file=sys.stderr)
        if self.bar is not None:
            self.bar.update(int(done) - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


def _report(found: dict[str, Any]) -> Report:
    """The report that the program printed."""
    bad, lost = found["non_finite"], found.get("lost")
    nan, infinity = float("nan"), float("inf")

    def value(of: dict[str, Any], name: str) -> float:
        if of[name] is not None:
            return float(of[name])
        return infinity if of.get(name + "_is") in ("infinite", "beyond float64") else nan

    return Report(
        value(found, "total_norm"),
        value(found, "clip_coef"),
        found["clipped"],
        found["elements"],
        found["tensors"],
        None if bad is None else NonFinite(bad["count"], -1, bad["tensor"], bad["index"]),
        None if lost is None else Lost(lost["zero"], lost["infinite"]),
        found.get("skipped"),
        "",
        [
            Segment(s["name"], None, None, value(s, "norm"), value(s, "clip_coef"), s["clip_coef"] != 1.0)
            for s in found.get("segments") or []
        ],
        {
            group["name"]: Report(
                value(group, "norm"),
                value(group, "clip_coef"),
                group["clipped"],
                group["elements"],
                0,
                None,
                None,
                None,
                "",
                [],
                {},
            )
            for group in found.get("groups") or []
        },
    )
