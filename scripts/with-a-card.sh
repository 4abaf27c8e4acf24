#!/usr/bin/env bash
# Measures a machine with an NVIDIA card in some five minutes: the tests on the card, `gradclip tune`, `gradclip bench`, the
# step of an optimizer, and PyTorch beside them. That machine needs the card's Vulkan driver with what this loads (Debian:
# libvulkan1, libegl1, libglvnd0, even without a display), a glibc no older than this machine's, and for the last part a
# Python with torch for CUDA; it needs no Rust and no network.
#
#   scripts/with-a-card.sh --make FOLDER    here: builds all and puts it into FOLDER, some 50 MB
#   FOLDER/scripts/with-a-card.sh           there: measures, and leaves everything in FOLDER/results
#
# Each part has a limit of its own, and the next one runs whatever becomes of it. The last line tells what failed.
#
# PEERS_PYTHON   the Python that has torch (python3)
set -uo pipefail

# The files of tests that read the sources, which are not there.
sources=(licences:: oracles:: optimizers:: device_steps:: reliability:: unsafe_inventory::)

if [ "${1:-}" = --make ]; then
    set -e
    folder=$(realpath -m "${2:?a folder to make}")
    cd "$(dirname "$0")/.."
    target=${CARGO_TARGET_DIR:-target}
    cargo build --release --locked -p gradclip-cli
    cargo test --locked -p gradclip --all-features --test suite --no-run
    cargo bench --locked -p gradclip --bench clip --no-run
    mkdir -p "$folder/scripts" "$folder/benches/peers"
    cp scripts/{with-a-card,devices}.sh "$folder/scripts"
    cp benches/peers/*.py "$folder/benches/peers"
    cp "$target/release/gradclip" "$folder/gradclip"
    # built COMMAND...: the program that cargo says it has built.
    built() { "$@" --no-run 2>&1 | sed -n 's/.*(\(.*-[0-9a-f]*\))$/\1/p'; }
    cp "$(built cargo test --locked -p gradclip --all-features --test suite)" "$folder/suite"
    cp "$(built cargo bench --locked -p gradclip --bench clip)" "$folder/clip-bench"
    strip "$folder"/{gradclip,suite,clip-bench}
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
. scripts/devices.sh
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
part suite 180 ./suite "${sources[@]/#/--skip=}"
GRADCLIP_TEST_DEVICE=small part suite-small 120 ./suite "${sources[@]/#/--skip=}" "${too_large[@]/#/--skip=}"
part tune 60 ./gradclip tune "${card[@]}" --seconds 45
part tune-host 40 ./gradclip tune "${card[@]}" --host --seconds 25
part bench 70 ./gradclip bench --backend gpu "${card[@]}" --sizes 1Mi,16Mi,64Mi,256Mi,768Mi --seconds 0.1
part bench-untuned 40 ./gradclip bench --backend gpu "${card[@]}" --sizes 64Mi --seconds 0.1 --no-tuning
part step 60 ./clip-bench --bench "gpu step" --warm-up-time 0.2 --measurement-time 0.5
if "$python" -c 'import torch; assert torch.cuda.is_available()' 2>"$results/torch.txt"; then
    part pytorch 200 "$python" benches/peers/gpu.py --gradclip ./gradclip --rounds 3 --seconds 0.05 --eager \
        --commit "$(cat commit)" --records "$results"
else
    echo "== pytorch: $python has no torch for CUDA (results/torch.txt)"
    failed+=" pytorch"
fi
echo "everything is in $results; failed:${failed:- nothing}"
[ -z "$failed" ]
