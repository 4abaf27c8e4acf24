# shellcheck shell=bash disable=SC2154
# Source scripts/devices.sh and scripts/mpi.sh first.

# dump_kernels FOLDER: writes every variant of every kernel there: NAME.wgsl, NAME.spv, and NAME.bindings, a line
# `GROUP BINDING KIND COUNT` for each binding after a first line `hot` for those that a step spends its time in.
dump_kernels() {
    install_mpi
    rm -rf "$1"
    mkdir "$1"
    # The same build as in scripts/test.sh, so that nothing is built anew.
    GRADCLIP_KERNELS=$1 cargo test --quiet "${together[@]}" --all-features --lib every_kernel_translates >/dev/null
    [ -n "$(find "$1" -name '*.spv' -print -quit)" ] || { echo "error: no kernel's SPIR-V was written to $1" >&2; exit 1; }
}
