#!/usr/bin/env bash
# Fuzzes every target in fuzz/ for SECONDS seconds each (by default 600), from the corpora in the repository, under
# AddressSanitizer. Fails if a target finds anything. New cases stay in fuzz/target.
#
#     scripts/fuzz.sh [SECONDS [TARGET...]]
#
# After a run, `scripts/fuzz.sh --minimise [TARGET...]` adds the new cases to the corpora and minimises these. Needs
# Linux on x86-64, a C++ compiler and this toolchain. cargo-fuzz works as well.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=600
minimise=
if [ "${1:-}" = --minimise ]; then
    minimise=yes
    shift
elif [ $# -gt 0 ]; then
    seconds=$1
    shift
fi
[ $# -gt 0 ] || set -- file index arguments builder state tables
command -v c++ >/dev/null || { echo "error: libFuzzer is built by a C++ compiler: install one (g++)" >&2; exit 1; }

# The flags that cargo-fuzz passes. The compiler calls its sanitizer options unstable; the variable makes this toolchain
# accept them.
host=x86_64-unknown-linux-gnu
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
# What a panic leaves behind is not a leak, and nothing here lives long.
export ASAN_OPTIONS=detect_leaks=0 RUST_BACKTRACE=0
cargo build --quiet --release --manifest-path fuzz/Cargo.toml --target $host --target-dir fuzz/target
unset RUSTFLAGS

failed=
for target in "$@"; do
    corpus=fuzz/corpus/$target found=fuzz/target/found/$target log=fuzz/target/$target.log
    mkdir -p "$found" "fuzz/target/findings/$target"
    run=(fuzz/target/$host/release/"$target" -rss_limit_mb=2048 -malloc_limit_mb=512 -timeout=20 -max_len=4096
        -artifact_prefix="fuzz/target/findings/$target/")
    if [ -n "$minimise" ]; then
        rm -rf "fuzz/target/minimised/$target"
        mkdir -p "fuzz/target/minimised/$target"
        "${run[@]}" -merge=1 "fuzz/target/minimised/$target" "$corpus" "$found" 2>"$log"
        rm -rf "$corpus"
        mv "fuzz/target/minimised/$target" "$corpus"
        echo "fuzz: $target: $(ls "$corpus" | wc -l) cases, $(cat "$corpus"/* | wc -c) bytes"
        continue
    fi
    if "${run[@]}" -max_total_time="$seconds" -print_final_stats=1 "$found" "$corpus" >"$log" 2>&1; then
        executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        memory=$(sed -n 's/^stat::peak_rss_mb: *//p' "$log")
        covered=$(grep -o 'cov: [0-9]*' "$log" | tail -1)
        echo "fuzz: $target: $executions executions in $seconds s, ${covered#cov: } edges, at most $memory MiB, no finding"
    else
        failed=yes
        echo "fuzz: $target: FOUND A CASE; the end of $log:" >&2
        tail -n 25 "$log" >&2
    fi
done
[ -z "$failed" ]
