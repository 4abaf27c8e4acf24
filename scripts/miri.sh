#!/usr/bin/env bash
# Runs those tests of the CPU path that Miri can run: the pool, partials, segments, portable kernels and the exchange
# between ranks. Adds Miri to rustup's nightly toolchain if it is missing.
#
# Miri cannot run the kernels for AVX2 and AVX-512 (it lacks their intrinsics, and runs the portable kernels, which are
# safe code), anything behind wgpu (foreign functions), or memory maps. `scripts/memory-checks.sh` runs the first and
# the last. Tests over many elements would take an interpreter hours, and that of units by any axes ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo +nightly miri --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal --no-self-update \
    --component miri,rust-src || {
    echo "error: rustup could not install Miri; install it where there is a network" >&2
    exit 1
}

# Tree borrows, because the older model of borrows forbids what rayon's crossbeam-epoch does. Threads of a pool that
# outlive the program are no leak. By default Miri adds rounding errors to powers of two.
export MIRIFLAGS="-Zmiri-deterministic-floats -Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows -Zmiri-permissive-provenance"
cargo +nightly miri test --target-dir target/miri -p gradclip --no-default-features --lib -- \
    cpu::pool partial:: segment:: processes::exchange powers_reach_the_ends sums_of_examples_agree \
    --skip units_by_any_set_of_axes
