#!/usr/bin/env bash
# Every WGSL module that a browser may be given, checked by Tint, Chrome's compiler, which holds to the standard where naga does
# not: barriers and operations of subgroups only where all invocations provably meet, no NaN among constants. Needs node 20 and
# npm, and runs Tint's WebGPU (Dawn) on SwiftShader.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh

version=0.6.2
tint=$(realpath -m "${CARGO_TARGET_DIR:-target}")/tint
wgsl=$tint/wgsl

install libvulkan1
install_swiftshader
grep -qs "\"version\": \"$version\"" "$tint/node_modules/webgpu/package.json" ||
    npm install --prefix "$tint" --no-audit --no-fund --silent "webgpu@$version"

rm -rf "$wgsl"
mkdir -p "$wgsl"
GRADCLIP_WGSL=$wgsl cargo test --quiet -p gradclip --all-features --lib every_kernel_translates >"$tint/cargo.log" || {
    cat "$tint/cargo.log" >&2
    exit 1
}
env "${swiftshader[@]}" node scripts/tint/check.mjs "$tint" "$wgsl"
