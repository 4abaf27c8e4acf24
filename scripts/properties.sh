#!/usr/bin/env bash
# Many random cases on every software device: scripts/properties.sh [CASES], 20,000 of them on each if not told; on two cores a
# thousand take two to eight minutes. PROPTEST_RNG_SEED chooses the first seed; it is taken from the clock if it is not set. A case
# that fails is printed with the command that runs it again. Prints a line for each device. Debian.
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
    env "$@" cargo test --quiet -p gradclip --all-features --test suite -- properties:: --nocapture >"$log" 2>&1 || status=$?
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
