"""Guards against an import that is slow, or that brings PyTorch or NumPy where nobody asked; and against stubs that lie."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import gradclip
import gradclip._gradclip as rust

PACKAGE = Path(gradclip.__file__).parent
RELEASE = Path(rust.__file__).stat().st_size < 20e6


def fresh(code):
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return out.stdout.strip()


def test_nothing_is_imported_before_it_is_needed():
    assert fresh("import gradclip, sys; print([m for m in ('torch', 'numpy', 'tqdm') if m in sys.modules])") == "[]"
    code = "import gradclip, sys, array; print(float(gradclip.norm([])), 'numpy' in sys.modules)"
    assert fresh(code) == "0.0 False"


def test_nothing_slow_is_imported():
    slow = "asyncio dataclasses inspect json pathlib subprocess"
    code = (
        f"import sys; before = set(sys.modules); import gradclip; print(set('{slow}'.split()) & (set(sys.modules) - before))"
    )
    assert fresh(code) == "set()"


def test_import_takes_less_than_50_ms():
    # A development build is four times as large, and other processes take their time.
    code = "import time; t = time.process_time(); import gradclip; print(time.process_time() - t)"
    assert min(float(fresh(code)) for _ in range(5)) < (0.05 if RELEASE else 0.15)


def test_the_stub_has_what_the_module_has():
    stub = ast.parse((PACKAGE / "_gradclip.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    there = {name for name in dir(rust) if not name.startswith("__")}
    assert declared == there
    for node in stub.body:
        if not isinstance(node, ast.ClassDef) or issubclass(getattr(rust, node.name), Exception):
            continue
        methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
        for method in methods - {"__init__"}:
            assert hasattr(getattr(rust, node.name), method), (node.name, method)
        public = {name for name in vars(getattr(rust, node.name)) if not name.startswith("_")}
        assert public <= methods


def test_everything_public_has_a_page():
    assert (PACKAGE / "py.typed").exists()
    for name in gradclip.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(gradclip, name)), name
