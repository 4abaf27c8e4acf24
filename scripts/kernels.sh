#!/usr/bin/env bash
# Gives every variant of every kernel to stricter compilers than naga: its SPIR-V to Khronos's validator, and the WGSL
# that a browser may get to Tint, Chrome's compiler. Takes seconds after scripts/test.sh --every-device has built the
# tests.
#
# Installs Debian's package spirv-tools, and the npm package webgpu (Dawn, with Tint inside), which runs on SwiftShader.
# Needs node 20.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh
. scripts/kernels/dump.sh

version=0.6.2
command -v npm >/dev/null || { echo "error: this needs node 20 and npm; install them" >&2; exit 1; }
install spirv-tools libvulkan1
install_swiftshader
npm=$devices/npm
grep -qs "\"version\": \"$version\"" "$npm/node_modules/webgpu/package.json" ||
    npm install --prefix "$npm" --no-audit --no-fund --silent "webgpu@$version"

folder=$devices/kernels
dump_kernels "$folder"
modules=$(find "$folder" -name '*.spv' -printf . | wc -c)
# The validator does not name the file.
find "$folder" -name '*.spv' -print0 | xargs -0 -n 1 -P "$(nproc)" sh -c \
    'spirv-val --target-env vulkan1.1 "$1" || { echo "error: not valid: $1" >&2; exit 1; }' sh
echo "spirv-val: $modules modules valid"
env "${swiftshader[@]}" node scripts/kernels/tint.mjs "$npm" "$folder"
