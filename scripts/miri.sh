#!/usr/bin/env bash
# Runs what Miri can of the CPU path's tests: the pool, partials, segments, portable kernels and the exchange between ranks. It
# needs a nightly toolchain with the components miri and rust-src: rustup component add --toolchain nightly miri rust-src
#
# What it cannot run: the kernels for AVX2 and AVX-512 (intrinsics that it does not know, so that it takes the portable ones,
# which are safe code), anything behind wgpu (foreign functions), memory maps. `scripts/memory-checks.sh` runs the first and
# the last. Tests that go over many elements would take an interpreter hours.
set -euo pipefail
cd "$(dirname "$0")/.."

# By tree borrows, because rayon's crossbeam-epoch does what the older model of borrows forbids. Threads of a pool that outlive
# the program are no leak. Left to itself, Miri adds errors of rounding to powers of two.
export MIRIFLAGS="-Zmiri-deterministic-floats -Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows -Zmiri-permissive-provenance"
cargo +nightly miri test --target-dir target/miri -p gradclip --no-default-features --lib -- \
    cpu::pool partial:: segment:: processes::exchange powers_reach_the_ends sums_of_examples_agree
