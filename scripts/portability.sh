#!/usr/bin/env bash
# Checks that the library and the program compile where no test runs: with the oldest Rust that Cargo.toml promises, on
# Windows and macOS; with --whole also on Linux, where the lints know what is too new. Links and runs nothing. Uses the
# release profile, which is what the README's first command builds.
#
# Installs that toolchain and its targets by rustup if they are missing. Takes about two minutes on two cores from an
# empty folder.
set -euo pipefail
cd "$(dirname "$0")/.."

rust=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
systems=(x86_64-pc-windows-msvc aarch64-apple-darwin)
[ "${1-}" != --whole ] || systems+=(x86_64-unknown-linux-gnu)

installed=$(rustup target list --toolchain "$rust" --installed 2>/dev/null || true)
for target in "${systems[@]}"; do
    grep -qx "$target" <<<"$installed" && continue
    rustup toolchain install "$rust" --profile minimal --no-self-update --target "$(IFS=,; echo "${systems[*]}")" || {
        echo "error: rustup could not install Rust $rust for ${systems[*]}, without which nothing here is checked;" \
            "install it where there is a network" >&2
        exit 1
    }
    break
done

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/portability
check=(cargo "+$rust" check --quiet --locked --release)

"${check[@]}" -p gradclip -p gradclip-cli --all-features "${systems[@]/#/--target=}"
printf "portability: Rust $rust on %s: library and program\n" "${systems[@]}"
