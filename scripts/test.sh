#!/usr/bin/env bash
# Runs the tests, on every machine that has Rust.
#
#   scripts/test.sh                    the library and the program, on the device that the library chooses here, without
#                                      the crates for burn, candle and MPI. If there is no Vulkan driver, installs a
#                                      software one first (Debian, Ubuntu). Other arguments go to the test runner.
#   scripts/test.sh --every-device     what each change must pass (Debian): the rows below without a star. A row with a
#                                      plus runs only if its paths differ from the commit in docs/RELIABILITY.md.
#   scripts/test.sh [--whole] ROW...   some rows. With --whole, as at night, every device also runs the files that set
#                                      their own limits or tunings, or are long.
#
#   lavapipe              everything: the library, the program and the ranks, on lavapipe
#   burn +                gradclip-burn, on lavapipe
#   candle +              gradclip-candle, on the CPU
#   python                the Python package, with Debian's PyTorch and NumPy, on lavapipe
#   instructions +        how many instructions the CPU's kernels need for an element
#   swiftshader-small     what runs on a GPU, on SwiftShader with subgroups of 4 and lowered limits
#   swiftshader *         the same without lowered limits
#   small *               the same on lavapipe, with subgroups of 8 and lowered limits
#   gl *                  the same on llvmpipe, by OpenGL
#   burn-fusion *         gradclip-burn with burn's fusion, on lavapipe
#   mpich *               the ranks under MPICH, on the CPU
#
# The rows of the library on Vulkan run under the validation layers of Khronos, which take a third of their time. So
# lavapipe does only with --whole. A missing device is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/mpi.sh
. scripts/steps.sh

# burn and candle compile slowly and the tests of their crates run quickly, so these crates are built without
# optimisation.
all=("${together[@]}" --all-features)
burn=(-p gradclip-burn --features wgpu --profile quick)
candle=(-p gradclip-candle --profile quick)
# Only optimised kernels are vectors, and only without checks of overflow.
instructions=(--profile vectors -p gradclip --no-default-features --lib cpu::tests::instructions)

each_change=(lavapipe burn candle python instructions swiftshader-small)
by_night=(swiftshader small gl burn-fusion mpich)

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
    # This builds the program too, which tells at once whether there is Vulkan; tests would tell much later.
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

# The tests that run kernels, without those that are the same on any device.
tests=(suite)
apart=({cut_into_pieces,licences,unsafe_inventory,reliability,pools,optimizers,optimizer_properties,small_updates,stepped_in_pieces}::)
# The files that choose their own limits or tunings, or are long.
if [ -n "$whole" ]; then
    tests+=(encode_allocates_nothing soak)
else
    apart+=({kernel_variants,tune,device_scopes,large_offsets,larger_than_device,long_sums,properties}:: random_steps_on_the_device)
fi
on_a_gpu=("${all[@]}" "${tests[@]/#/--test=}")
# With an example, so that its dependencies have the features that the tests ask of them, and are not built anew.
program=("${all[@]}" --bin gradclip --example own_buffers)
# On OpenGL wgpu's `submit` runs the work before it returns, and wgpu reports no allocations. It also panics if one
# thread waits for the context for six seconds while another compiles.
not_on_gl=(encoding_does_not_wait_for_the_queue the_budget_is_kept)

results=()
failed=

# on NAME COMMAND SKIPPED... -- ENVIRONMENT...: runs the tests of the command `${COMMAND[@]}`, without those skipped, in
# this environment. If it has validation layers, which write to standard output, these must be active and must have
# found nothing.
on() {
    local name=$1 skipped=() log=$devices/tests.log validated= passed
    # At night the counts of tests are wanted.
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
        elif cargo build --quiet "${program[@]}" && validates "$@"; then
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

# unless_passed ROW PATH...: whether the row must run. A row that is asked for by name or at night must; any other must
# if one of these paths differs from the commit at which docs/RELIABILITY.md says that the row has passed.
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
            install_mpi
            [ -z "$whole" ] || install_swiftshader
            on "everything on lavapipe" all -- "${lavapipe[@]}" ${whole:+"${validation[@]}"}
            ;;
        burn)
            unless_passed burn crates/gradclip-burn ':!crates/gradclip-burn/benches' api/gradclip.txt Cargo.lock || continue
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
        python)
            install_lavapipe
            step "the Python package"
            env "${lavapipe[@]}" scripts/python.sh || failed+="the Python package; "
            results+=("the Python package: $(tail -1 "$devices/python.log")")
            ;;
        instructions)
            unless_passed instructions src/cpu Cargo.lock Cargo.toml || continue
            on "instructions an element" instructions --
            ;;
        small)
            install_lavapipe
            install_swiftshader
            on "lavapipe, subgroups of 8, lowered limits" on_a_gpu "${apart[@]}" "${too_large[@]}" -- \
                "${lavapipe[@]}" "${validation[@]}" GRADCLIP_TEST_DEVICE=subgroups,small
            ;;
        swiftshader)
            install_swiftshader
            on "SwiftShader" on_a_gpu "${apart[@]}" -- "${swiftshader[@]}" "${validation[@]}"
            ;;
        swiftshader-small)
            install_swiftshader
            on "SwiftShader, subgroups of 4, lowered limits" on_a_gpu "${apart[@]}" "${too_large[@]}" -- \
                "${swiftshader[@]}" "${validation[@]}" GRADCLIP_TEST_DEVICE=subgroups,small
            ;;
        gl)
            install_gl
            on "llvmpipe by OpenGL" on_a_gpu "${apart[@]}" "${not_on_gl[@]}" -- "${gl[@]}" RUST_TEST_THREADS=1
            ;;
        mpich)
            install_mpich
            # A target folder of its own, because build results do not record their MPI.
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
