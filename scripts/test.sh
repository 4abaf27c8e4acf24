#!/usr/bin/env bash
# Runs the whole test suite, on every machine that has Rust: where no Vulkan driver is found, a software one is
# installed first (Debian, Ubuntu). Arguments are passed on to the test runner.
set -euo pipefail
cd "$(dirname "$0")/.."

# Mesa's device-select layer complains wherever there is no desktop session.
[ -n "${XDG_RUNTIME_DIR:-}" ] || export NODEVICE_SELECT=1

vulkan_is_there() {
    cargo run --quiet -p gradclip-cli -- devices --json | grep -q '"backend":"Vulkan"'
}

if ! vulkan_is_there; then
    if ! command -v apt-get >/dev/null; then
        echo "error: no Vulkan device found; install a driver (Mesa's lavapipe needs no GPU) and run this again" >&2
        exit 1
    fi
    echo "no Vulkan device found: installing Mesa's software driver"
    as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo)
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq mesa-vulkan-drivers libvulkan1
    vulkan_is_there || { echo "error: still no Vulkan device; see: cargo run -p gradclip-cli -- devices" >&2; exit 1; }
fi

cargo test --workspace --all-features "$@"

# Only optimised kernels are vectors, and only without checks of overflow.
cargo test --release -p gradclip --no-default-features --lib cpu::instructions
