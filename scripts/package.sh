#!/usr/bin/env bash
# Packs what would be published, and checks it from the packed files alone: the library with its shaders, examples and
# documentation, and the program with that library and gradclip-common. With --whole also builds it and runs the
# program. Only packs the crates for burn, candle and MPI, which take too long to check. Reuses dependencies that
# `cargo package` would build anew, twice.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

packages=(gradclip gradclip-common gradclip-cli gradclip-candle gradclip-burn gradclip-mpi)
cargo package --quiet --no-verify --allow-dirty "${packages[@]/#/--package=}"
version=$(cargo metadata --quiet --no-deps --format-version 1 | sed 's/.*"name":"gradclip","version":"\([^"]*\)".*/\1/')
members=()
for package in "${packages[@]}"; do
    members+=("$package-$version")
    tar -xzf "$CARGO_TARGET_DIR/package/$package-$version.crate" -C "$work"
    for file in README.md LICENSE-APACHE LICENSE-MIT; do
        [ -s "$work/$package-$version/$file" ] || { echo "error: $package is packed without $file" >&2; exit 1; }
    done
done

# The crates lie side by side, far from the repository, with its versions and profiles, so that its build results fit.
{
    printf '[workspace]\nresolver = "3"\nmembers = ["%s", "%s", "%s"]\n' "${members[@]:0:3}"
    printf '[patch.crates-io]\ngradclip = { path = "gradclip-%s" }\ngradclip-common = { path = "gradclip-common-%s" }\n' "$version" "$version"
    sed -n '/^\[profile\.dev\]/,/^$/p; /^\[profile\.dev\.package/,/^$/p' Cargo.toml
} >"$work/Cargo.toml"
cp Cargo.lock "$work"
example=$PWD/examples/data/lstm_grads.safetensors
cd "$work"
cargo check --quiet --workspace --lib --bins --examples
# With the examples and the program's features, so that dependencies are those of the check. The program has no pages.
features=gradclip/serde,gradclip-common/gpu
RUSTDOCFLAGS="-D warnings" cargo doc --quiet -p gradclip -p gradclip-common --features $features --no-deps --lib --examples
if [ "${1-}" = --whole ]; then
    cargo build --quiet --workspace --lib --bins --examples
    "$CARGO_TARGET_DIR/debug/gradclip" clip "$example" --max-norm 0.2 --backend cpu -o clipped.safetensors >/dev/null
fi
files() { find "$1" -type f | wc -l; }
echo "packages: $(for member in "${members[@]}"; do echo -n "$member ($(files "$member") files) "; done)"
