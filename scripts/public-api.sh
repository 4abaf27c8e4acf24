#!/usr/bin/env bash
# Compares the library's public API, with all features, with the list in api/gradclip.txt, so that nobody changes it by
# accident. With --bless, writes the list anew. An item that vanishes or changes breaks users.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# rustdoc calls its JSON unstable; the variable makes this toolchain write it. It is set for rustdoc alone, so that
# cargo's build results stay valid.
printf '#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec "%s" "$@" -Z unstable-options --output-format json\n' \
    "${RUSTDOC:-rustdoc}" >"$work/rustdoc"
chmod +x "$work/rustdoc"
RUSTDOC="$work/rustdoc" RUSTDOCFLAGS="" cargo doc --quiet --package gradclip --lib --no-deps --all-features
cargo run --quiet --locked --manifest-path scripts/public-api/Cargo.toml --target-dir "$target/public-api" -- \
    "$target/doc/gradclip.json" >"$work/list"

if [ "${1:-}" = --bless ]; then
    cp "$work/list" api/gradclip.txt
elif ! diff -u api/gradclip.txt "$work/list"; then
    echo "error: the public API has changed; if that was meant, run scripts/public-api.sh --bless and edit CHANGELOG.md" >&2
    exit 1
fi
echo "public API: $(wc -l <"$work/list") items"
