#!/usr/bin/env bash
# Checks every dependency on every platform by deny.toml: licences, duplicates, sources and known advisories. Installs
# cargo-deny if it is missing, which takes minutes.
#
#     scripts/deny.sh [--offline]      offline: uses the last fetched database of advisories, or none
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v cargo-deny >/dev/null; then
    cargo install cargo-deny --locked --root target/tools
    PATH="$PWD/target/tools/bin:$PATH"
fi
deny=(cargo deny --workspace --all-features)
"${deny[@]}" check --hide-inclusion-graph licenses bans sources
advisories="no known advisory"
if [ "${1:-}" = --offline ] || ! "${deny[@]}" fetch db; then
    if compgen -G "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs/advisory-db-*/*" >/dev/null; then
        "${deny[@]}" --offline check advisories
        advisories+=" by the database that was fetched last"
    else
        advisories="advisories not checked, because no database could be fetched"
    fi
else
    "${deny[@]}" check advisories
fi
echo "deny: licences, bans and sources ok; $advisories"
