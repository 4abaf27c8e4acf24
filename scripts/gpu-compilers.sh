#!/usr/bin/env bash
# Gives every variant of every kernel for hardware to AMD's compiler, which needs no card: Mesa's RADV compiles for a GPU
# that is not there. Fails if it refuses a kernel, if a kernel spills registers, or if the counts of a hot kernel differ
# from scripts/gpu-compilers/gfx1100.txt. With --bless, writes this file anew. Takes half a minute after scripts/test.sh
# --every-device has built the tests.
#
# The file's columns: vector registers; subgroups that a SIMD holds at once; bytes of workgroup memory; instructions; the
# most loads of 16 bytes without a wait between them; the compiler's own estimate of the latency, in cycles. These are
# counts of one compiler (Mesa 22.3 of Debian 12) for one GPU (RDNA 3), not timings.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh
. scripts/kernels/dump.sh

install_lavapipe
folder=$devices/kernels
dump_kernels "$folder"
# Variants for software have workgroups of 8.
find "$folder" -name '* 8 *' -delete

golden=scripts/gpu-compilers/gfx1100.txt counts=$devices/gfx1100.txt
env RADV_FORCE_FAMILY=gfx1100 VK_DRIVER_FILES=/usr/share/vulkan/icd.d/radeon_icd.x86_64.json MESA_SHADER_CACHE_DISABLE=true \
    cargo run --quiet --release --locked --manifest-path scripts/gpu-compilers/Cargo.toml \
    --target-dir "${CARGO_TARGET_DIR:-target}/gpu-compilers" -- "$folder" >"$counts"

if [ "${1:-}" = --bless ]; then
    cp "$counts" "$golden"
elif ! diff -u "$golden" "$counts"; then
    echo "error: AMD's compiler counts something else; if that was meant, run scripts/gpu-compilers.sh --bless" >&2
    exit 1
fi
