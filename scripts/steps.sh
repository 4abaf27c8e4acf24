# Times the steps of a script. Other scripts source this.
# shellcheck shell=bash
#
#   step NAME     ends the previous step and begins one: prints a heading now, and the seconds when it ends
#   steps_end     ends the last step
#
# A script that another calls adds its steps to the caller's list; during a step of the caller they are indented. When
# the outermost script exits, even with an error, it prints all steps, and the sum of those that are not indented.
if [ -z "${STEPS:-}" ]; then
    STEPS=$(mktemp)
    export STEPS
    trap steps_table EXIT
fi
step_name=
indent=${STEPS_INDENT:-}

step() {
    steps_end
    step_name=$*
    export STEPS_INDENT="$indent  "
    step_begin=$SECONDS
    echo "== $step_name"
}

steps_end() {
    [ -n "$step_name" ] || return 0
    local seconds=$((SECONDS - step_begin))
    echo "== $step_name: $seconds s"
    printf '%6d s  %s\n' "$seconds" "$indent$step_name" >>"$STEPS"
    step_name=
    STEPS_INDENT=$indent
}

steps_table() {
    local status=$?
    [ -z "$step_name" ] || [ "$status" -eq 0 ] || step_name+=" (ended with an error)"
    steps_end
    echo "== seconds"
    cat "$STEPS"
    awk '/ s  [^ ]/ { sum += $1 } END { printf "%6d s  in all (%d min %d s)\n", sum, sum / 60, sum % 60 }' "$STEPS"
    rm -f "$STEPS"
}
