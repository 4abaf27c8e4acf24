#!/usr/bin/env bash
# Runs the tests, on every machine that has Rust.
#
#   scripts/test.sh                      the library and the program, on the device that the library chooses here; where no Vulkan
#                                        driver is found, a software one is installed first (Debian, Ubuntu). Other arguments
#                                        are passed on to the test runner. Without the crates for burn, candle and MPI.
#   scripts/test.sh --every-device       what each change must pass (Debian): the rows below without a star. Those with a plus
#                                        run only if what they test differs from what docs/RELIABILITY.md says they have passed.
#   scripts/test.sh [--whole] ROW...     some rows. With --whole, as by night: on every device the files too that choose limits
#                                        or tunings of their own, or are long.
#
#   lavapipe              everything: the library, the program and the ranks, on lavapipe
#   burn +                gradclip-burn, on lavapipe
#   candle +              gradclip-candle, on the CPU
#   instructions +        how many instructions the CPU's kernels take for an element
#   small                 what runs on a GPU, on lavapipe with subgroups of 8 and lowered limits
#   swiftshader           the same on SwiftShader
#   burn-fusion *         gradclip-burn with burn's fusion, on lavapipe
#   swiftshader-small *   what runs on a GPU, on SwiftShader with subgroups of 4 and lowered limits
#   gl *                  the same on llvmpipe, by OpenGL
#   mpich *               the ranks under MPICH, on the CPU
#
# On Vulkan, rows of the library run under the validation layers of Khronos. A device that cannot be had is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh
. scripts/steps.sh

# burn and candle take long to compile and the tests of their crates little to run, so those are built without optimisation; and
# each by itself, because what one asks of dependencies that are shared would build everything else anew.
all=(--workspace --exclude gradclip-burn --exclude gradclip-candle --all-features)
burn=(-p gradclip-burn --features wgpu --profile quick)
candle=(-p gradclip-candle --profile quick)
# Only optimised kernels are vectors, and only without checks of overflow.
instructions=(--profile vectors -p gradclip --no-default-features --lib cpu::tests::instructions)

each_change=(lavapipe burn candle instructions small swiftshader)
by_night=(burn-fusion swiftshader-small gl mpich)

asked=${1-}
whole=
rows=()
case "${1-}" in
    --every-device)
        [ $# -eq 1 ] || { echo "error: --every-device takes nothing else; name rows instead" >&2; exit 2; }
        rows=("${each_change[@]}")
        ;;
    --whole)
        shift
        [ $# -gt 0 ] || { echo "error: --whole takes rows: ${each_change[*]} ${by_night[*]}" >&2; exit 2; }
        whole=yes
        rows=("$@")
        ;;
    [a-z]*) [[ " ${each_change[*]} ${by_night[*]} " != *" $1 "* ]] || rows=("$@") ;;
esac

if [ ${#rows[@]} -eq 0 ]; then
    all+=(--exclude gradclip-mpi)
    step "build"
    # With the tests, which tell much later, comes the program, which tells at once.
    cargo test --no-fail-fast "${all[@]}" --no-run
    vulkan_is_there() { "${CARGO_TARGET_DIR:-target}/debug/gradclip" devices --json | grep -q '"backend":"Vulkan"'; }
    if ! vulkan_is_there; then
        install_lavapipe
        vulkan_is_there || { echo "error: still no Vulkan device; see: cargo run -p gradclip-cli -- devices" >&2; exit 1; }
    fi
    step "tests"
    cargo test --no-fail-fast "${all[@]}" "$@"
    exit
fi

# The tests that run kernels, without what is the same on any device.
tests=(suite)
apart=(cut_into_pieces licences unsafe_inventory reliability pools)
# What chooses limits or tunings of its own, or is long.
if [ -n "$whole" ]; then
    tests+=(encode_allocates_nothing soak)
else
    apart+=(kernel_variants device_scopes large_offsets larger_than_device long_sums properties)
fi
# The program has a suite of its own, which runs on lavapipe.
on_a_gpu=("${all[@]}" --exclude gradclip-cli "${tests[@]/#/--test=}")
# What by its very size is refused under lowered limits, and a count of allocations, which is that of one dispatch for each kernel.
too_large=(more_units_than_a_dispatch_dimension_holds three_thousand_tensors_of_one_norm_each long_rows_and_many_columns
    speeds_are_of_what_was_moved behind_the_callers_own_pass three_thousand_tensors_cost_one_merge)
# On OpenGL wgpu's `submit` runs the work before it returns, and wgpu has no report of what is allocated; and it panics where one
# thread waits for the context for six seconds while another compiles.
not_on_gl=(encoding_does_not_wait_for_the_queue the_budget_is_kept)

results=()
failed=

# on NAME COMMAND SKIPPED... -- ENVIRONMENT...: the tests of the command `${COMMAND[@]}` but those skipped, in this environment.
# Under validation layers, which write to standard output, they must be at work, and must have found nothing.
on() {
    local name=$1 skipped=() log=$devices/tests.log validated= passed
    # By night what tests have counted is wanted.
    [ -z "$whole" ] || skipped=(--nocapture)
    local -n command=$2
    shift 2
    while [ "$1" != -- ]; do skipped+=("--skip=$1"); shift; done
    shift
    step "$name"
    env "$@" cargo test --no-fail-fast "${command[@]}" -- "${skipped[@]}" 2>&1 | tee "$log" || failed+="$name; "
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
    passed=$(awk '/^test result: ok/ { sum += $4 } END { print sum + 0 }' "$log")
    [ "$passed" -gt 0 ] || failed+="no test of $name; "
    results+=("$name: $passed tests passed$validated")
}
found='Validation [A-Z][A-Za-z ]*: \['

# unless_passed ROW PATH...: whether the row must run: always when asked for by name or by night, else if one of these paths differs
# from the commit at which docs/RELIABILITY.md says that the row has passed.
unless_passed() {
    local row=$1 commit
    shift
    [ "$asked" = --every-device ] || return 0
    commit=$(sed -n "s/^| $row | .* | \([0-9a-f]\{7,40\}\) | [-0-9]* |\$/\1/p" docs/RELIABILITY.md)
    if [ -n "$commit" ] && git diff --quiet "$commit" -- "$@" 2>/dev/null; then
        results+=("$row: not run, because nothing it tests has changed since it passed at $commit")
        return 1
    fi
}

for row in "${rows[@]}"; do
    case "$row" in
        lavapipe)
            install_lavapipe
            install_swiftshader
            install_mpi
            on "everything on lavapipe" all -- "${lavapipe[@]}" "${validation[@]}"
            ;;
        burn)
            unless_passed burn crates/gradclip-burn api/gradclip.txt Cargo.lock || continue
            install_lavapipe
            on "burn, on lavapipe" burn -- "${lavapipe[@]}"
            ;;
        burn-fusion)
            install_lavapipe
            fusion=("${burn[@]}" --features burn/fusion --test suite)
            on "burn with fusion, on lavapipe" fusion -- "${lavapipe[@]}"
            ;;
        candle)
            unless_passed candle crates/gradclip-candle api/gradclip.txt Cargo.lock || continue
            on "candle, on the CPU" candle --
            ;;
        instructions)
            unless_passed instructions src/cpu Cargo.lock Cargo.toml || continue
            on "instructions an element" instructions --
            ;;
        small)
            install_lavapipe
            install_swiftshader
            on "lavapipe, subgroups of 8, lowered limits" on_a_gpu "${apart[@]/%/::}" "${too_large[@]}" -- \
                "${lavapipe[@]}" "${validation[@]}" GRADCLIP_TEST_DEVICE=subgroups,small
            ;;
        swiftshader)
            install_swiftshader
            on "SwiftShader" on_a_gpu "${apart[@]/%/::}" -- "${swiftshader[@]}" "${validation[@]}"
            ;;
        swiftshader-small)
            install_swiftshader
            on "SwiftShader, subgroups of 4, lowered limits" on_a_gpu "${apart[@]/%/::}" "${too_large[@]}" -- \
                "${swiftshader[@]}" "${validation[@]}" GRADCLIP_TEST_DEVICE=subgroups,small
            ;;
        gl)
            install_gl
            on "llvmpipe by OpenGL" on_a_gpu "${apart[@]/%/::}" "${not_on_gl[@]}" -- "${gl[@]}" RUST_TEST_THREADS=1
            ;;
        mpich)
            install_mpich
            # A target folder of its own, because what is built does not know the MPI that it was built for.
            mpich=(-p gradclip-mpi --no-default-features --features program)
            on "ranks under MPICH, on the CPU" mpich -- MPICC=mpicc.mpich CARGO_TARGET_DIR="$devices/mpich"
            ;;
        *)
            echo "error: no row is called $row; there are: ${each_change[*]} ${by_night[*]}" >&2
            exit 2
            ;;
    esac
done
steps_end

printf 'tests: %s\n' "${results[@]}"
if [ -n "$failed" ]; then
    echo "error: failed: $failed" >&2
    exit 1
fi
