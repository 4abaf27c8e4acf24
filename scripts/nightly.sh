#!/usr/bin/env bash
# What takes too long for every change, one after another: some hours on two cores. Prints most figures of docs/RELIABILITY.md.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/test.sh --every-device --whole
cargo test --workspace --exclude gradclip-burn --exclude gradclip-candle --no-default-features
scripts/package.sh --whole
scripts/memory-checks.sh --whole
scripts/properties.sh
scripts/soak.sh
scripts/fuzz.sh
scripts/miri.sh
scripts/deny.sh
