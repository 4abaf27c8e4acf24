#!/usr/bin/env bash
# Runs what takes too long for every change, one part after another: about two hours on two cores (Debian). Prints a
# table of the counts, and writes it into docs/RELIABILITY.md.
#
#   scripts/nightly.sh            every part
#   scripts/nightly.sh PART...    some; the table keeps the rows of the others
#
# A part that fails keeps its old row, and the script fails in the end.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/steps.sh

# Tests that repeat something do it at full length. Without the feature gpu, and under an emulator, what counts is that they
# pass: the row lavapipe has run the same tests.
export GRADCLIP_WHOLE=1

page=docs/RELIABILITY.md
rows=(lavapipe burn burn-fusion candle instructions swiftshader-small swiftshader small gl mpich)
parts=("${rows[@]}" python no-gpu kernels web published memory aarch64 properties soak fuzz miri deny)

# Each part is one command, or several joined by &&: errors do not end a function that `if` calls.
run() {
    case "$1" in
        no-gpu)
            env -u GRADCLIP_WHOLE cargo test "${together[@]}" --no-default-features
            ;;
        kernels) scripts/kernels.sh && scripts/gpu-compilers.sh ;;
        web) scripts/web.sh --test ;;
        published) scripts/public-api.sh && scripts/package.sh --whole && scripts/portability.sh --whole ;;
        memory) scripts/memory-checks.sh --whole ;;
        properties) scripts/properties.sh 1000 ;;
        fuzz) scripts/fuzz.sh 100 ;;
        python) scripts/python.sh --newest ;;
        aarch64) env -u GRADCLIP_WHOLE scripts/aarch64.sh ;;
        soak | miri | deny) "scripts/$1.sh" ;;
        *) scripts/test.sh --whole "$1" ;;
    esac
}

# figures PART LOG: the counts of a part, separated by <br>; if it printed none, how many tests passed. The short soaks of
# other parts are left out.
figures() {
    local found of=$counted
    [ "$1" = soak ] || of=${counted/|soak/}
    found=$(grep -aoE "^(test .* \.\.\. )?($of): .*" "$2" | sed -E 's/^test .* \.\.\. //' | sed 's/|/\\|/g' | sed -z 's/\n$//; s/\n/<br>/g')
    [ -n "$found" ] || found=$(awk '/^test result: ok/ { sum += $4 } END { if (sum) print sum " tests passed" }' "$2")
    echo "${found:-passed}"
}
counted='tests|properties|soak|fuzz|kills|full disk|changing input|faults|out of memory|kernels translated|spirv-val|tint|amd|inventory'
counted+='|licences|portability|python|web suite|web page|packages|public API|aarch64|deny'

[ $# -gt 0 ] || set -- "${parts[@]}"
for part in "$@"; do
    [[ " ${parts[*]} " == *" $part "* ]] || { echo "error: no part is called $part; there are: ${parts[*]}" >&2; exit 2; }
done

commit=$(git rev-parse --short=9 HEAD)
git diff --quiet HEAD -- . ":!$page" || commit+=" and changes"
failed=
for part in "$@"; do
    log=$devices/nightly-$part.log begin=$SECONDS
    step "$part"
    if run "$part" 2>&1 | tee "$log"; then
        row="| $part | $(figures "$part" "$log") | $(((SECONDS - begin + 30) / 60)) | $commit | $(date -u +%F) |"
        # Rows stand in the order of the parts.
        {
            sed '/^<!-- nightly -->$/q' "$page"
            printf '| part | what was counted | minutes | commit | date |\n|---|---|---|---|---|\n'
            for name in "${parts[@]}"; do
                if [ "$name" = "$part" ]; then echo "$row"; else grep "^| $name | .* |\$" "$page" || true; fi
            done
            sed -n '/^<!-- end of nightly -->$/,$p' "$page"
        } >"$page.new"
        mv "$page.new" "$page"
    else
        failed+=" $part"
    fi
done
steps_end

sed -n '/^<!-- nightly -->$/,/^<!-- end of nightly -->$/p' "$page"
if [ -n "$failed" ]; then
    echo "error: failed:$failed; their rows are of an earlier night" >&2
    exit 1
fi
