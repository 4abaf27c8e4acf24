#!/usr/bin/env bash
# Gives the hot kernels to NVIDIA's compiler, which needs no card, for four generations of cards, and adds a dated record of
# its registers and instructions to benches/records: counts, not timings. For developers: it gets the compiler from PyPI
# (packages nvidia-cuda-nvcc and nvidia-cuda-cuobjdump, 0.3 GB), which has a licence of its own. AMD's compiler, which
# scripts/gpu-compilers.sh runs, is counted beside it. Takes 3 minutes on two free cores.
#
# scripts/gpu-compilers/nvidia/translate.py turns WGSL into CUDA C++, and count.py counts.
#
# Three more compilers of real GPUs run without one, but want more than packages: Mesa's for NVIDIA (NVK), Intel and Apple.
# Debian 13 has these drivers, and Mesa's sources have shims that stand for a kernel's (meson option `tools=drm-shim`):
# LD_PRELOAD one of them, and give its ICD file to scripts/gpu-compilers' `count-kernels` by VK_DRIVER_FILES.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/devices.sh
. scripts/mpi.sh
. scripts/kernels/dump.sh

here=scripts/gpu-compilers/nvidia python=$devices/nvidia
if [ ! -e "$python/nvcc-is-there" ]; then
    python3 -m venv "$python"
    "$python/bin/pip" install --quiet nvidia-cuda-nvcc nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm
    touch "$python/nvcc-is-there"
fi
nvcc=$(find "$python" -name nvcc -type f)
PATH=$(dirname "$nvcc"):$PATH

install_lavapipe
kernels=$devices/kernels cuda=$devices/cuda hot=$devices/hot
dump_kernels "$kernels"
rm -rf "$cuda" "$hot"
mkdir "$cuda" "$hot"
grep -lx hot "$kernels"/*' Quads 256 subgroups.bindings' "$kernels"/Step*.bindings | sed 's/bindings$//' |
    while read -r kernel; do cp "$kernel"bindings "$kernel"spv "$kernel"wgsl "$hot"; done
env RADV_FORCE_FAMILY=gfx1100 VK_DRIVER_FILES=/usr/share/vulkan/icd.d/radeon_icd.x86_64.json MESA_SHADER_CACHE_DISABLE=true \
    cargo run --quiet --release --locked --manifest-path scripts/gpu-compilers/Cargo.toml \
    --target-dir "${CARGO_TARGET_DIR:-target}/gpu-compilers" -- "$hot" "$cuda" >/dev/null
for listing in "$cuda"/*.s; do mv "$listing" "${listing%.s}.gfx1100.s"; done
one() {
    local file=$1 arch=$2 name
    name=$(basename "$file" .wgsl)
    python3 "$here/translate.py" "$file" >"$cuda/$name.$arch.cu"
    # Division and roots need to be no more exact than Vulkan says.
    nvcc -std=c++20 -prec-div=false -prec-sqrt=false "-arch=$arch" -w "-I$here" -cubin -Xptxas -v -o "$cuda/$name.$arch.cubin" "$cuda/$name.$arch.cu" \
        >"$cuda/$name.$arch.log" 2>&1 || { cat "$cuda/$name.$arch.log" >&2; return 1; }
    cuobjdump -sass "$cuda/$name.$arch.cubin" >"$cuda/$name.$arch.sass"
}
export -f one
export here cuda PATH
for file in "$hot"/*.wgsl; do for arch in sm_80 sm_89 sm_90 sm_100; do printf '%s\0%s\0' "$file" "$arch"; done; done |
    xargs -0 -n 2 -P "$(nproc)" bash -c 'one "$1" "$2"' bash

record=benches/records/$(date -u +%F)-nvidia-compiler.md
{
    [ -e "$record" ] || printf '# What NVIDIA'\''s compiler makes of the kernels, %s\n' "$(date -u +%F)"
    printf '\nAt %s, nvcc %s.\n\n' "$(git describe --always --dirty)" "$(nvcc --version | sed -n 's/.*release \([^,]*\).*/\1/p')"
    python3 "$here/count.py" "$cuda"
} >"$cuda/record.md"
cat "$cuda/record.md" >>"$record"
echo "added to $record"
