# Gets what tests need (Debian), above all software devices, and sets the environment that chooses each. Other scripts
# source this.
# shellcheck shell=bash disable=SC2034

# Mesa's device-select layer complains without a desktop session.
[ -n "${XDG_RUNTIME_DIR:-}" ] || export NODEVICE_SELECT=1

# Where RUST_BACKTRACE is set, debug builds of wgpu trace each lock, which takes a third of a test's time.
export RUST_LIB_BACKTRACE=0

devices=$(realpath -m "${CARGO_TARGET_DIR:-target}")/devices
mkdir -p "$devices"

lavapipe=(VK_DRIVER_FILES=/usr/share/vulkan/icd.d/lvp_icd.x86_64.json WGPU_BACKEND=vulkan)
swiftshader=("VK_DRIVER_FILES=$devices/vk_swiftshader_icd.json" WGPU_BACKEND=vulkan)
gl=(WGPU_BACKEND=gl)

# The crates whose tests are built together. burn and candle compile slowly, and each would add features to what the others
# depend on, and so build it anew.
together=(--workspace --exclude gradclip-burn --exclude gradclip-candle)

# Lowered limits refuse these: the sets or the tests' own kernels are too large. What a step costs in allocations is counted
# for one dispatch of each kernel, on a device whose limits suffice for an optimizer.
too_large=(more_units_than_a_dispatch_dimension_holds three_thousand_tensors_of_one_norm_each long_rows_and_many_columns
    units_along_any_axes long_matrices speeds_are_of_what_was_moved behind_the_callers_own_pass three_thousand_tensors_cost_one_merge
    a_step_costs_what_its_dispatches_cost the_same_at_each_step_of_one_plan training_runs_ahead_of_the_device a_million_positive_examples)

# Khronos's validation layers, with synchronisation: debug builds of wgpu load them if they are found. Two messages are
# left out, because wgpu causes them whatever its caller does:
# - 10684: naga gives arrays in workgroup memory a stride, which SPIR-V 1.4 and later forbid and every driver ignores.
# - 10247: with arrays of buffers, wgpu asks for robust access and updates after binding on a device that lacks one.
validation=(
    "VK_LAYER_PATH=$devices"
    VK_LAYER_DEBUG_ACTION=VK_DBG_LAYER_ACTION_LOG_MSG
    VK_LAYER_REPORT_FLAGS=error,warn,perf
    VK_LAYER_MESSAGE_ID_FILTER=VUID-StandaloneSpirv-None-10684,VUID-VkDeviceCreateInfo-robustBufferAccess-10247
)

# validates ENVIRONMENT...: whether the layers are active in debug builds in this environment. They say so only at level
# `info`.
validates() {
    env "$@" VK_LAYER_REPORT_FLAGS=error,warn,perf,info "${CARGO_TARGET_DIR:-target}/debug/gradclip" devices |
        grep -aq 'Current Validation Enabled'
}

# install PACKAGE...: installs packages by apt-get, unless they are there.
install() {
    if ! command -v apt-get >/dev/null; then
        echo "error: this needs a software device; install Mesa's Vulkan driver (lavapipe), which needs no GPU" >&2
        exit 1
    fi
    dpkg -s "$@" >/dev/null 2>&1 && return
    echo "installing $*"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@"
}
as_root=()
[ "$(id -u)" -eq 0 ] || as_root=(sudo)

# add_target TARGET: adds a target to rustup's toolchain, unless it is there.
add_target() {
    rustup target list --installed 2>/dev/null | grep -qx "$1" || rustup target add "$1" || {
        echo "error: rustup could not add the target $1; add it where there is a network" >&2
        exit 1
    }
}

install_lavapipe() {
    install mesa-vulkan-drivers libvulkan1
}

install_gl() {
    install libegl1 libegl-mesa0 libgles2 libgl1-mesa-dri
}

# Unpacks SwiftShader and the validation layers from a package of Debian's chromium, without installing it.
install_swiftshader() {
    [ ! -e "$devices/VkLayer_khronos_validation.json" ] || return 0
    local unpacked=$devices/chromium
    mkdir -p "$unpacked"
    "${as_root[@]}" apt-get update -qq
    (cd "$unpacked" && apt-get download -qq chromium-common && dpkg-deb -x chromium-common_*.deb .)
    cp "$unpacked"/usr/lib/chromium/{libvk_swiftshader.so,vk_swiftshader_icd.json,libVkLayer_khronos_validation.so} "$devices" || {
        echo "error: this distribution's chromium-common has no SwiftShader; Debian's has" >&2
        exit 1
    }
    rm -r "$unpacked"
    cat >"$devices/VkLayer_khronos_validation.json" <<END
{
    "file_format_version": "1.2.0",
    "layer": {
        "name": "VK_LAYER_KHRONOS_validation",
        "type": "GLOBAL",
        "library_path": "./libVkLayer_khronos_validation.so",
        "api_version": "1.3.0",
        "implementation_version": "1",
        "description": "Khronos validation",
        "instance_extensions": [
            { "name": "VK_EXT_debug_report", "spec_version": "9" },
            { "name": "VK_EXT_debug_utils", "spec_version": "1" },
            { "name": "VK_EXT_layer_settings", "spec_version": "2" },
            { "name": "VK_EXT_validation_features", "spec_version": "2" }
        ]
    }
}
END
}
