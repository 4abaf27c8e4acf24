#!/usr/bin/env bash
# Runs what Miri can of the CPU path's tests: the portable kernels and the pool. It needs a nightly toolchain with the
# components miri and rust-src: rustup component add --toolchain nightly miri rust-src
set -euo pipefail
cd "$(dirname "$0")/.."

# By tree borrows, because rayon's crossbeam-epoch does what the older model of borrows forbids.
#
# The pool is what matters: its is the only `unsafe` code that is not an intrinsic. Of the kernels, which are safe code where
# they are portable, a few go along; all of them would take an interpreter hours. Threads of a pool that outlive the program
# are no leak.
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows -Zmiri-permissive-provenance"
cargo +nightly miri test --target-dir target/miri -p gradclip --no-default-features --lib -- \
    cpu::pool powers_reach_the_ends sums_of_examples_agree
