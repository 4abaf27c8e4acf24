#!/usr/bin/env bash
# Builds the page for browsers (crates/gradclip-web) and serves it.
#
#   scripts/web.sh [PORT]    builds it into target/web/page and serves that folder at http://localhost:8000. Any static
#                            host will do for the folder: it needs https, because browsers give WebGPU to nothing else.
#   scripts/web.sh --suite   runs the library's tests for the web on Dawn, Chrome's WebGPU, under node: seconds
#   scripts/web.sh --test    that, and tests the page in Debian's chromium on SwiftShader, with a file of 1 GiB.
#                            With --picture, also writes docs/web.png anew. With a name, runs the tests of that name.
#
# Installs what it needs: rustup's target for wasm, node and npm, the npm packages webgpu and playwright-core, and
# chromium (Debian). The tests need node 20. Fails if the page is longer over the wire than it may be.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/devices.sh
. scripts/steps.sh

# Over the wire, compressed as every host does.
most_bytes=400000

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
web=$target/web
npm=$devices/npm
wasm=wasm32-unknown-unknown
mode=${1:-8000}

# package NAME FEATURES PROFILE: builds the wasm with these features, and a package for browsers of it in $web/NAME.
package() {
    add_target "$wasm"
    # Every browser that has WebGPU has vectors in wasm.
    CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="-C target-feature=+simd128" \
        cargo build --quiet --locked -p gradclip-web --lib --profile "$3" --target "$wasm" --features "$2"
    rm -rf "${web:?}/$1"
    cargo run --quiet --locked --manifest-path scripts/web/bindgen/Cargo.toml --target-dir "$target/web-bindgen" -- \
        "$target/$wasm/$3/gradclip_web.wasm" "$web/$1"
}

build() {
    step "the page"
    package page "" web
    cp crates/gradclip-web/page/* "$web/page"
    local bytes=0 file size
    for file in "$web"/page/*; do
        size=$(gzip -9 <"$file" | wc -c)
        bytes=$((bytes + size))
    done
    echo "web page: $bytes bytes over the wire, of at most $most_bytes"
    [ "$bytes" -le "$most_bytes" ] || { echo "error: the page is too long" >&2; exit 1; }
}

# npm_package NAME VERSION
npm_package() {
    grep -qs "\"version\": \"$2\"" "$npm/node_modules/$1/package.json" ||
        npm install --prefix "$npm" --no-audit --no-fund --silent "$1@$2"
}

install_node() {
    command -v npm >/dev/null || install nodejs npm
}

# Dawn's package asks for it.
check_node() {
    install_node
    [ "$(node -p 'process.versions.node.split(".")[0]')" -ge 20 ] || {
        echo "error: the tests need node 20, and this is $(node --version)" >&2
        exit 1
    }
}

suite() {
    check_node
    install libvulkan1
    install_swiftshader
    npm_package webgpu 0.6.2
    step "the library's tests for the web"
    # The profile `web` makes wasm small, and takes long; tests need not be small.
    package suite suite quick
    env "${swiftshader[@]}" node scripts/web/suite.mjs "$npm" "$web/suite"
}

case "$mode" in
    --suite) suite ;;
    --test)
        build
        suite
        step "the page in chromium"
        install chromium
        npm_package playwright-core 1.65.1
        node scripts/web/test.mjs "$npm" "$web" "${@:2}"
        ;;
    [1-9]*)
        install_node
        build
        steps_end
        node scripts/web/serve.mjs "$web/page" "$mode"
        ;;
    *)
        echo "error: give a port, --suite or --test" >&2
        exit 2
        ;;
esac
