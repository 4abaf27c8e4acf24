#!/usr/bin/env bash
# Runs the whole test suite, on every machine that has Rust: where no Vulkan driver is found, a software one is
# installed first (Debian, Ubuntu). Other arguments are passed on to the test runner.
#
#   scripts/test.sh                           on the device that the library chooses here; without gradclip-burn and
#                                             gradclip-candle: cargo test -p gradclip-burn --features wgpu --profile quick, ...
#                                             and without gradclip-mpi, which needs an MPI: cargo test -p gradclip-mpi
#   scripts/test.sh --every-device            everything on lavapipe, and then what runs on a GPU on each of the software devices
#                                             below, on Vulkan under the validation layers of Khronos; one that cannot be had is
#                                             an error (Debian)
#   scripts/test.sh --every-device --whole    there too the files that choose limits or tunings of their own, SwiftShader with
#                                             subgroups and lowered limits, which take long to compile, and the ranks' tests
#                                             under MPICH
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh

# burn and candle take long to compile and the tests of their crates little to run, so those are built without optimisation; and
# each by itself, because what one asks of dependencies that are shared would build everything else anew.
all=(--workspace --exclude gradclip-burn --exclude gradclip-candle --all-features)
burn=(-p gradclip-burn --features wgpu --profile quick)
candle=(-p gradclip-candle --profile quick)
# Only optimised kernels are vectors, and only without checks of overflow.
vectors=(--profile vectors -p gradclip --no-default-features --lib cpu::instructions)

if [ "${1-}" != --every-device ]; then
    all+=(--exclude gradclip-mpi)
    # With the tests, which tell much later, comes the program, which tells at once.
    cargo test --no-fail-fast "${all[@]}" --no-run
    vulkan_is_there() { "${CARGO_TARGET_DIR:-target}/debug/gradclip" devices --json | grep -q '"backend":"Vulkan"'; }
    if ! vulkan_is_there; then
        install_lavapipe
        vulkan_is_there || { echo "error: still no Vulkan device; see: cargo run -p gradclip-cli -- devices" >&2; exit 1; }
    fi
    cargo test --no-fail-fast "${all[@]}" "$@"
    cargo test "${vectors[@]}"
    exit
fi
shift
whole=
if [ "${1-}" = --whole ]; then
    whole=yes
    shift
fi

install_lavapipe
install_swiftshader
install_gl
install_mpi

# The tests that run kernels, without what is the same on any device.
tests=(suite faults)
apart=(cut_into_pieces licences unsafe_inventory)
# What chooses limits or tunings of its own, or is long.
if [ -n "$whole" ]; then
    tests+=(encode_allocates_nothing larger_than_device properties soak)
else
    apart+=(kernel_variants device_scopes large_offsets long_sums)
fi

results=()
failed=
skipped=()

# on NAME SKIPPED... -- ENVIRONMENT...: the tests that `only` chooses, without those that `skipped` or this call names, on one
# device, and what they printed, for the table at the end. Under validation layers, which write to standard output, they must be
# at work, and must have found nothing.
on() {
    local name=$1 skipped=("${skipped[@]}") log=$devices/tests.log begin=$SECONDS validated= passed
    shift
    while [ "$1" != -- ]; do skipped+=("$1"); shift; done
    shift
    echo "== $name"
    env "$@" cargo test --no-fail-fast "${only[@]}" -- "${skipped[@]/#/--skip=}" 2>&1 | tee "$log" ||
        failed+="$name; "
    if [[ " $* " == *" VK_LAYER_PATH="* ]]; then
        if grep -aqE "$found" "$log"; then
            grep -a -A6 -E "$found" "$log" | head -60 >&2
            failed+="validation on $name; "
        elif validates "$@"; then
            validated=", nothing found by validation"
        else
            failed+="no validation layer on $name; "
        fi
    fi
    passed=$(awk '/^test result: ok/ { sum += $4 } END { print sum }' "$log")
    results+=("$name: $passed tests passed in $((SECONDS - begin)) s$validated")
}
found='Validation [A-Z][A-Za-z ]*: \['

only=("${all[@]}" "$@")
on "everything on lavapipe" -- "${lavapipe[@]}" "${validation[@]}"

only=("${burn[@]}")
on "burn, on lavapipe" -- "${lavapipe[@]}"
only=("${burn[@]}" --features burn/fusion --test suite)
on "burn with fusion, on lavapipe" -- "${lavapipe[@]}"
only=("${candle[@]}")
on "candle, on the CPU" --
cargo test "${vectors[@]}"
if [ -n "$whole" ]; then
    install_mpich
    # A target folder of its own, because what is built does not know the MPI that it was built for.
    only=(-p gradclip-mpi --no-default-features --features program)
    on "ranks under MPICH, on the CPU" -- MPICC=mpicc.mpich CARGO_TARGET_DIR="$devices/mpich"
fi

# The suite of the library, not that of the program.
only=("${all[@]}" --exclude gradclip-cli "${tests[@]/#/--test=}")
skipped=("${apart[@]/%/::}")
# What by its very size is refused there, and a count of allocations, which is that of one dispatch for each kernel.
too_large=(more_units_than_a_dispatch_dimension_holds three_thousand_tensors_of_one_norm_each long_rows_and_many_columns
    speeds_are_of_what_was_moved behind_the_callers_own_pass three_thousand_tensors_cost_one_merge)
on "lavapipe, subgroups of 8, lowered limits" "${too_large[@]}" -- \
    "${lavapipe[@]}" "${validation[@]}" GRADCLIP_TEST_DEVICE=subgroups,small
on "SwiftShader" -- "${swiftshader[@]}" "${validation[@]}"
if [ -n "$whole" ]; then
    on "SwiftShader, subgroups of 4, lowered limits" "${too_large[@]}" -- \
        "${swiftshader[@]}" "${validation[@]}" GRADCLIP_TEST_DEVICE=subgroups,small
fi
# On OpenGL wgpu's `submit` runs the work before it returns, and wgpu has no report of what is allocated; and it panics where one
# thread waits for the context for six seconds while another compiles.
on "llvmpipe by OpenGL" encoding_does_not_wait_for_the_queue the_budget_is_kept -- "${gl[@]}" RUST_TEST_THREADS=1

echo "== devices"
printf '%s\n' "${results[@]}"
if [ -n "$failed" ]; then
    echo "error: failed: $failed" >&2
    exit 1
fi
