#!/usr/bin/env bash
# Runs random cases on every software device (Debian): scripts/properties.sh [CASES], by default 20,000 on each device.
# A thousand take two to eight minutes on two cores. PROPTEST_RNG_SEED sets the first seed; by default it is taken from
# the clock. Prints a line for each device, and each failed case with the command that runs it again.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
install_lavapipe
install_swiftshader
install_gl

export PROPTEST_CASES="${1:-20000}"
export PROPTEST_RNG_SEED="${PROPTEST_RNG_SEED:-$(date +%s)000}"
echo "seed $PROPTEST_RNG_SEED"

cargo test --quiet -p gradclip --all-features --test suite --no-run
failed=
# on ENVIRONMENT...
on() {
    local log=$devices/properties.log status=0
    env "$@" cargo test --quiet -p gradclip --all-features --test suite -- properties:: device_steps::random --nocapture >"$log" 2>&1 || status=$?
    grep -a -o 'properties:.*' "$log" || status=1
    if [ "$status" -ne 0 ]; then
        failed=yes
        echo "error: with $*:" >&2
        grep -a -v 'properties:' "$log" >&2
    fi
}
on "${lavapipe[@]}"
on "${lavapipe[@]}" GRADCLIP_TEST_DEVICE=subgroups
on "${lavapipe[@]}" GRADCLIP_TEST_DEVICE=small
on "${swiftshader[@]}"
on "${gl[@]}" RUST_TEST_THREADS=1
[ -z "$failed" ]
