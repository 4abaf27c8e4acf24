#!/usr/bin/env bash
# The soak test in its full length: scripts/soak.sh [STEPS], 100,000 if not told. Prints a line for each of its loops.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -n "${XDG_RUNTIME_DIR:-}" ] || export NODEVICE_SELECT=1
out=$(mktemp)
trap 'rm -f "$out"' EXIT
if ! GRADCLIP_SOAK_STEPS="${1:-100000}" cargo test --quiet -p gradclip --test soak -- --nocapture >"$out" 2>&1; then
    cat "$out" >&2
    exit 1
fi
grep -o 'soak:.*' "$out"
