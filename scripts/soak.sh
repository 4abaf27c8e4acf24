#!/usr/bin/env bash
# Runs the soak test in its full length: scripts/soak.sh [STEPS], by default 100,000. Prints a line for each loop.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh

log=$devices/soak.log
if ! GRADCLIP_SOAK_STEPS="${1:-100000}" cargo test --quiet -p gradclip --all-features --test soak -- --nocapture >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
grep -a -o 'soak:.*' "$log"
