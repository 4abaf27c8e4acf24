#!/usr/bin/env bash
# Runs kernels under GPU-assisted validation of Khronos's layers, where every access to a buffer is checked as it happens: what
# shows on a device that modules without checks of bounds (`kernels::trusted`) stay within what is bound. On lavapipe; minutes,
# because instrumented kernels take long to compile. Debian.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
install_lavapipe
install_swiftshader

checked=("${lavapipe[@]}" "${validation[@]}" VK_LAYER_GPUAV_ENABLE=1 VK_LAYER_VALIDATE_CORE=0 VK_LAYER_VALIDATE_SYNC=0)
finds='Validation Error'
log=$devices/gpu-assisted.log

env "${checked[@]}" cargo test -p gradclip --all-features --lib -- --ignored --exact \
    gpu::kernels::tests::behind_what_is_bound 2>&1 | tee "$log"
grep -aq "$finds" "$log" || { echo "error: the layer does not tell of an access behind what is bound" >&2; exit 1; }

tests=(misaligned non_finite odd_lengths many_tiny device_adaptive outside_norms plan_update)
env "${checked[@]}" cargo test -p gradclip --all-features "${tests[@]/#/--test=}" 2>&1 | tee "$log"
if grep -aq "$finds" "$log"; then
    grep -a -A8 "$finds" "$log" | head -60 >&2
    exit 1
fi
echo "gpu-assisted: $(awk '/^test result: ok/ { sum += $4 } END { print sum }' "$log") tests, every access within what is bound;" \
    "the control was found"
