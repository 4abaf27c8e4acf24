#!/usr/bin/env bash
# Runs the tests of the CPU path under AddressSanitizer, which sees every instruction set of the machine (Linux on
# x86-64). With --whole it also runs the tests of the program, with memory maps and files that are whole, truncated,
# hostile and sharded, and the tests of the CPU path under valgrind (Debian's package valgrind), which lacks AVX-512 and
# so sees AVX2.
set -euo pipefail
cd "$(dirname "$0")/.."

# The parts of the suite that read and write at odd places.
suite=(misaligned odd_lengths non_finite scopes cut_into_pieces outside_norms pools stepped_in_pieces)
# These two go over millions of elements.
filter=(--skip powers_are_within --skip progress_adds_up)

echo "== AddressSanitizer"
# The compiler calls its sanitizer option unstable; the variable makes this toolchain accept it.
sanitized() {
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS=detect_leaks=0 \
        cargo test --target x86_64-unknown-linux-gnu --target-dir target/asan --profile quick --no-default-features "$@"
}
sanitized -p gradclip --lib
sanitized -p gradclip --test suite -- "${suite[@]/%/::}"

[ "${1-}" = --whole ] || exit 0
# Its tests run the program that is built beside them. `larger_than_memory` is left out: it counts pages, and the
# sanitizer adds its own.
program=(bad_files bad_tensors exit_codes output_whole_or_not_at_all passes_through pieces sharded sums)
sanitized -p gradclip-cli --lib
sanitized -p gradclip-cli --test program -- "${program[@]/%/::}"

command -v valgrind >/dev/null || { echo "error: valgrind is missing: install the package of that name" >&2; exit 1; }
echo "== valgrind"
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=9"
cargo test --target x86_64-unknown-linux-gnu --target-dir target/valgrind -p gradclip --no-default-features --lib -- \
    --test-threads 1 "${filter[@]}"
