#!/usr/bin/env bash
# Checks every dependency on every platform by deny.toml: licences, duplicates, where it comes from and, with the database of
# advisories at hand, what is known against it. Installs cargo-deny where it is missing, which takes minutes.
#
#     scripts/deny.sh [--offline]      without fetching the database: the one that was fetched last, if any
set -euo pipefail
cd "$(dirname "$0")/.."

offline=()
[ "${1:-}" = --offline ] && offline=(--offline)
if ! command -v cargo-deny >/dev/null; then
    cargo install cargo-deny --locked --root target/tools
    PATH="$PWD/target/tools/bin:$PATH"
fi
cargo deny --all-features check --hide-inclusion-graph licenses bans sources
if [ -n "${offline[*]}" ] && ! compgen -G "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs/*" >/dev/null; then
    echo "advisories: not checked, for there is no database here" >&2
    exit 0
fi
cargo deny --all-features "${offline[@]}" check "${offline[@]:+--disable-fetch}" --hide-inclusion-graph advisories
