#!/usr/bin/env bash
# Gives the SPIR-V of every variant of every kernel to Khronos's validator: Debian's package spirv-tools, installed where it is
# missing. `src/gpu/every_language.rs` writes it. Seconds, where scripts/test.sh --every-device has built the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh

install spirv-tools
install_mpi
folder=$devices/spirv
rm -rf "$folder"
mkdir "$folder"
# What scripts/test.sh builds, so that nothing is built anew.
GRADCLIP_SPIRV=$folder cargo test --quiet --workspace --exclude gradclip-burn --exclude gradclip-candle --all-features --lib \
    every_kernel_translates >/dev/null

modules=$(find "$folder" -name '*.spv' -printf . | wc -c)
[ "$modules" -gt 0 ] || { echo "error: no kernel's SPIR-V was written to $folder" >&2; exit 1; }
# The validator does not name the file.
find "$folder" -name '*.spv' -print0 | xargs -0 -n 1 -P "$(nproc)" sh -c \
    'spirv-val --target-env vulkan1.1 "$1" || { echo "error: not valid: $1" >&2; exit 1; }' sh
echo "spirv-val: $modules modules valid"
