#!/usr/bin/env bash
# Holds the library's public API, with all features, against the list in api/gradclip.txt, so that nobody changes it unawares.
# With --bless, writes the list anew: what vanishes from it, or changes, breaks users.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-target}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# rustdoc calls its JSON unstable; the variable lets this toolchain write it. Set for rustdoc alone, so that what cargo has
# built serves.
printf '#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec "%s" "$@" -Z unstable-options --output-format json\n' \
    "${RUSTDOC:-rustdoc}" >"$work/rustdoc"
chmod +x "$work/rustdoc"
RUSTDOC="$work/rustdoc" RUSTDOCFLAGS="" cargo doc --quiet --package gradclip --lib --no-deps --all-features
cargo run --quiet --locked --manifest-path scripts/public-api/Cargo.toml --target-dir "$target/public-api" -- \
    "$target/doc/gradclip.json" >"$work/list"

if [ "${1:-}" = --bless ]; then
    cp "$work/list" api/gradclip.txt
elif ! diff -u api/gradclip.txt "$work/list"; then
    echo "error: the public API has changed; if it was meant to: scripts/public-api.sh --bless, and CHANGELOG.md" >&2
    exit 1
fi
echo "public API: $(wc -l <"$work/list") items"
