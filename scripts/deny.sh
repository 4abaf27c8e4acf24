#!/usr/bin/env bash
# Checks every dependency on every platform by deny.toml: licences, duplicates, where it comes from, and what is known against
# it. Installs cargo-deny where it is missing, which takes minutes.
#
#     scripts/deny.sh [--offline]      with the database of advisories that was fetched last; without one, leaves them out
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v cargo-deny >/dev/null; then
    cargo install cargo-deny --locked --root target/tools
    PATH="$PWD/target/tools/bin:$PATH"
fi
deny=(cargo deny --workspace --all-features)
"${deny[@]}" check --hide-inclusion-graph licenses bans sources
if [ "${1:-}" != --offline ]; then
    "${deny[@]}" check advisories
elif compgen -G "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs/advisory-db-*" >/dev/null; then
    "${deny[@]}" --offline check advisories
else
    echo "advisories: not checked, for no database was fetched yet" >&2
fi
