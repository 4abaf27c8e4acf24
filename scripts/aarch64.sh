#!/usr/bin/env bash
# Runs the tests of the CPU path on AArch64, with NEON, under qemu's user emulation. Takes about ten minutes.
#
# Installs, if they are missing, qemu, the cross compiler's linker and C library (Debian: qemu-user,
# gcc-aarch64-linux-gnu, libc6-dev-arm64-cross) and, by rustup, the target.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh

target=aarch64-unknown-linux-gnu
install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
add_target "$target"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
log=$devices/aarch64.log
# The skipped test starts its own program again, which an emulator for one program cannot do.
cargo test --no-fail-fast --target "$target" --profile quick -p gradclip --no-default-features --lib --test suite -- \
    --skip no_threads_to_be_had 2>&1 | tee "$log"

# A test binary that ran nothing must not pass for one that passed.
awk '/^test result: ok/ { tests += $4; seconds += $NF; programs++ }
    END {
        if (programs != 2 || !tests) { print "error: not both programs ran tests" > "/dev/stderr"; exit 1 }
        printf "aarch64: %d tests passed under qemu in %.0f s\n", tests, seconds
    }' "$log"
