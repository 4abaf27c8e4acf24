#!/usr/bin/env bash
# Measures the CPU path, PyTorch, Optax and the machine's own limits on the same arrays and number of threads, prints
# the ratios beside the targets, and adds a section to benches/records/. Needs Linux and 6 GiB of memory; takes minutes.
#
#   scripts/bench-cpu.sh            everything
#   scripts/bench-cpu.sh --quick    small arrays, few rounds, no record: checks that it works
#
# THREADS        how many threads, and cores to pin them to (2)
# PEERS_PYTHON   a Python that has torch, jax, optax and numpy; without one, target/peers-venv is made (some GB)
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
arguments=(--threads "${THREADS:-2}")
case "$*" in
    "") arguments+=(--records benches/records) ;;
    --quick) arguments+=(--quick) ;;
    *) sed -n '2,9s/^# \{0,1\}//p' scripts/bench-cpu.sh >&2 && exit 2 ;;
esac

python=${PEERS_PYTHON:-}
if [ -z "$python" ]; then
    python=$target/peers-venv/bin/python
    [ -x "$python" ] || python3 -m venv "$target/peers-venv"
    # Checked each time, so that an interrupted installation is completed.
    "$python" -c 'import jax, numpy, optax, torch' 2>/dev/null ||
        "$python" -m pip install --quiet --disable-pip-version-check torch jax optax numpy
fi

cargo build --release --quiet -p gradclip-peers
exec "$python" benches/peers/cpu.py --library "$target/release/libgradclip_peers.so" "${arguments[@]}"
