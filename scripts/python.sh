#!/usr/bin/env bash
# Checks the types of the Python package, builds it and runs its tests (Debian).
#
#   scripts/python.sh             a development build, with Debian's Python, PyTorch (1.13) and NumPy
#   scripts/python.sh --newest    the wheel, built from the source distribution alone and installed beside PyPI's newest
#                                 PyTorch, in an environment of its own; with more cases, and checks of the size and
#                                 of whether it compiles for a Python without the GIL
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh

package=crates/gradclip-python
log=$devices/python.log
: >"$log"

install python3-venv
# Debian's mypy is too old for these types.
[ -x "$devices/mypy/bin/mypy" ] || { python3 -m venv "$devices/mypy" && "$devices/mypy/bin/pip" install --quiet mypy; }
(cd "$package" && "$devices/mypy/bin/mypy" --no-incremental)

if [ "${1-}" = --newest ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m venv "$work/venv"
    "$work/venv/bin/pip" install --quiet maturin torch numpy ml_dtypes pytest tqdm
    "$work/venv/bin/maturin" sdist --manifest-path "$package/Cargo.toml" --out "$work/sdist" 2>"$log" || { cat "$log" >&2; exit 1; }
    # Far from the repository, so that it builds from its own files.
    "$work/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$work/wheel" "$work"/sdist/*.tar.gz
    wheel=$(ls "$work"/wheel/*.whl)
    bytes=$(stat -c %s "$wheel")
    [ "$bytes" -lt 12000000 ] || { echo "error: the wheel has $bytes bytes" >&2; exit 1; }
    "$work/venv/bin/pip" install --quiet "$wheel"
    "$work/venv/bin/gradclip" norm examples/data/lstm_grads.safetensors --backend cpu >/dev/null
    GRADCLIP_WHOLE=1 "$work/venv/bin/python" -m pytest -q -p no:cacheprovider "$package/tests" 2>&1 | tee "$log"
    # What such a Python says of itself; none is needed to compile.
    printf '%s\n' implementation=CPython version=3.14 shared=true abi3=false build_flags=Py_GIL_DISABLED \
        suppress_build_script_link_lines=true >"$work/free-threaded"
    PYO3_CONFIG_FILE=$work/free-threaded cargo check --quiet --locked -p gradclip-python --lib \
        --target-dir "${CARGO_TARGET_DIR:-target}/free-threaded"
    torch=$("$work/venv/bin/python" -c 'import torch; print(torch.__version__)')
    echo "python: a wheel of $bytes bytes; $(tail -1 "$log" | grep -o '[0-9]* passed') with PyTorch $torch"
    exit
fi

install python3-torch python3-numpy python3-pytest
install_mpi
# The features and the targets of scripts/test.sh, so that nothing is built anew that its tests have built.
cargo build "${together[@]}" --all-features --lib --example own_buffers
cp "${CARGO_TARGET_DIR:-target}/debug/lib_gradclip.so" "$package/python/gradclip/_gradclip.abi3.so"
export PYTHONPATH=$PWD/$package/python PYTHONDONTWRITEBYTECODE=1
/usr/bin/python3 -m pytest -q -p no:cacheprovider "$package/tests" 2>&1 | tee "$log"
