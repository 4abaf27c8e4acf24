#!/usr/bin/env bash
# Measures the GPU path and PyTorch (foreach, eager and compiled) in turns on the same card, prints the ratios beside
# the targets, and adds a section to benches/records/. It needs the built program and a Python that has torch, and takes
# about ten minutes. Without a CUDA card it runs PyTorch on the CPU and the program on a software device, and says that
# this tells nothing about a GPU.
#
#   scripts/bench-gpu.sh            everything
#   scripts/bench-gpu.sh --quick    small sets, few rounds, no record: checks that it works
#
# GRADCLIP       the program; by default target/release/gradclip, built first if there is cargo
# PEERS_PYTHON   the Python (python3)
# RECORDS        the folder for the record (benches/records)
set -euo pipefail
program=${GRADCLIP:+$(realpath "$GRADCLIP")}
records=$(realpath -m "${RECORDS:-$(dirname "$0")/../benches/records}")
cd "$(dirname "$0")/.."

case "$*" in
    "") arguments=(--records "$records") ;;
    --quick) arguments=(--quick) ;;
    *) sed -n '2,13s/^# \{0,1\}//p' scripts/bench-gpu.sh >&2 && exit 2 ;;
esac

# Mesa's device-select layer complains without a desktop session.
[ -n "${XDG_RUNTIME_DIR:-}" ] || export NODEVICE_SELECT=1

python=${PEERS_PYTHON:-python3}
if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "error: $python has no torch; name a Python that has it: PEERS_PYTHON=... scripts/bench-gpu.sh" >&2
    exit 1
fi
if [ -z "$program" ]; then
    program=${CARGO_TARGET_DIR:-target}/release/gradclip
    if command -v cargo >/dev/null; then
        cargo build --release --quiet -p gradclip-cli
    elif [ ! -x "$program" ]; then
        echo "error: no program at $program and no cargo to build it; name one: GRADCLIP=... scripts/bench-gpu.sh" >&2
        exit 1
    fi
fi
mkdir -p "$records"
exec "$python" benches/peers/gpu.py --gradclip "$program" "${arguments[@]}"
