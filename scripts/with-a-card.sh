#!/usr/bin/env bash
# Measures a machine with an NVIDIA card in less than ten minutes: the tests on the card, `gradclip tune`, `gradclip bench`,
# and PyTorch beside it. That machine needs the card's Vulkan driver, a glibc no older than this machine's, and for the last
# part a Python with torch for CUDA; it needs no Rust and no network.
#
#   scripts/with-a-card.sh --make FOLDER    here: builds all and puts it into FOLDER, some 100 MB
#   FOLDER/scripts/with-a-card.sh           there: measures, and leaves everything in FOLDER/results
#
# Each part has a limit of its own, and the next one runs whatever becomes of it. The last line tells what failed.
#
# PEERS_PYTHON   the Python that has torch (python3)
set -uo pipefail

# The files of tests that run kernels and read nothing but what is in the program.
tests=(half_conversions:: kernel_variants:: semantics:: long_sums:: huge_and_tiny:: non_finite:: odd_lengths:: misaligned::
    untouched:: scopes:: many_tiny:: skipped_steps:: device_adaptive:: device_outside:: plan_update:: profile:: repeats::)

if [ "${1:-}" = --make ]; then
    set -e
    folder=$(realpath -m "${2:?a folder to make}")
    cd "$(dirname "$0")/.."
    target=${CARGO_TARGET_DIR:-target}
    cargo build --release --locked -p gradclip-cli
    cargo test --locked -p gradclip --all-features --test suite --no-run
    mkdir -p "$folder/scripts" "$folder/benches/peers"
    cp scripts/with-a-card.sh "$folder/scripts"
    cp benches/peers/*.py "$folder/benches/peers"
    cp "$target/release/gradclip" "$folder/gradclip"
    # cargo names the newest one last.
    suite=$(cargo test --locked -p gradclip --all-features --test suite --no-run 2>&1 | sed -n 's/.*(\(.*suite-[0-9a-f]*\))$/\1/p')
    cp "$suite" "$folder/suite"
    git describe --always --dirty >"$folder/commit"
    echo "copy $folder to the machine with the card, and run scripts/with-a-card.sh in it"
    exit
fi

cd "$(dirname "$0")/.." || exit
if [ ! -x gradclip ] || [ ! -x suite ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | head -n -1 >&2
    exit 2
fi
results=$PWD/results
mkdir -p "$results"
export WGPU_BACKEND=vulkan XDG_CONFIG_HOME=$results/config
[ -n "${XDG_RUNTIME_DIR:-}" ] || export NODEVICE_SELECT=1
python=${PEERS_PYTHON:-python3}
failed=

# part NAME SECONDS COMMAND...: runs it with that limit, and keeps what it says.
part() {
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    printf '== %s\n' "$name"
    timeout "$limit" "$@" >"$results/$name.txt" 2>&1 || status=$?
    tail -n 4 "$results/$name.txt"
    printf '   %s: status %d after %d s\n' "$name" "$status" $((SECONDS - begin))
    [ "$status" -eq 0 ] || failed+=" $name"
}

{ cat commit; nvidia-smi; uname -a; } >"$results/machine.txt" 2>&1
if ! ./gradclip devices --json | tee "$results/devices.json" | grep -q NVIDIA; then
    echo "error: no NVIDIA card is found by Vulkan; results/devices.json lists what is" >&2
    exit 1
fi
card=(--adapter NVIDIA)
part suite 180 ./suite "${tests[@]}"
part tune 60 ./gradclip tune "${card[@]}" --seconds 45
part tune-host 40 ./gradclip tune "${card[@]}" --host --seconds 25
part bench 70 ./gradclip bench --backend gpu "${card[@]}" --sizes 1Mi,16Mi,64Mi,256Mi --seconds 0.3
part bench-untuned 40 ./gradclip bench --backend gpu "${card[@]}" --sizes 64Mi --seconds 0.3 --no-tuning
if "$python" -c 'import torch; assert torch.cuda.is_available()' 2>"$results/torch.txt"; then
    part pytorch 200 "$python" benches/peers/gpu.py --gradclip ./gradclip --rounds 2 --records "$results"
else
    echo "== pytorch: $python has no torch for CUDA (results/torch.txt)"
    failed+=" pytorch"
fi
echo "everything is in $results; failed:${failed:- nothing}"
[ -z "$failed" ]
