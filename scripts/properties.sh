#!/usr/bin/env bash
# Many random cases on every device that is found: scripts/properties.sh [CASES], 20,000 of them on each if not told.
# PROPTEST_RNG_SEED chooses the first seed; it is taken from the clock if it is not set. A case that fails is printed with
# the command that runs it again. Prints a line for each device.
#
# Devices: the one that is opened by default, and the same drivers with and without what GRADCLIP_TEST_DEVICE changes;
# wgpu's OpenGL; and those whose Vulkan drivers are listed in GRADCLIP_VULKAN_DRIVERS (paths of manifests, separated by
# spaces).
set -euo pipefail
cd "$(dirname "$0")/.."

export PROPTEST_CASES="${1:-20000}"
export PROPTEST_RNG_SEED="${PROPTEST_RNG_SEED:-$(date +%s)000}"
[ -n "${XDG_RUNTIME_DIR:-}" ] || export NODEVICE_SELECT=1
echo "seed $PROPTEST_RNG_SEED"

cargo test --quiet -p gradclip --test properties --no-run
failed=0
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# on_device NAME VARIABLE=VALUE...
on_device() {
    local name="$1" status=0
    shift
    env "$@" cargo test --quiet -p gradclip --test properties -- --nocapture >"$out" 2>&1 || status=$?
    if grep -q 'properties:' "$out"; then
        grep -o 'properties:.*' "$out" | sed "s|^|$name: |"
        grep '^again:' "$out" || true
    elif grep -q 'no GPU adapter found' "$out"; then
        echo "$name: no such device here"
        return
    fi
    if [ "$status" -ne 0 ]; then
        failed=1
        grep -v 'properties:\|^again:' "$out" >&2
    fi
}

on_device vulkan
on_device vulkan-subgroups GRADCLIP_TEST_DEVICE=subgroups
on_device vulkan-small GRADCLIP_TEST_DEVICE=small
on_device gl WGPU_BACKEND=gl
for driver in ${GRADCLIP_VULKAN_DRIVERS:-}; do
    on_device "$driver" VK_DRIVER_FILES="$driver"
done
exit "$failed"
