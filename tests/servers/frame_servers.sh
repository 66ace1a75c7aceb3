#!/usr/bin/env bash
# Make sure that the real servers of frames that the tests start are here: nginx, openssl (for its certificate), and for
# buckets, in .cache: the Versity S3 Gateway and fake-gcs-server where Go is, Azurite where npm is. None is left running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH=$PATH:/usr/sbin

cache=$PWD/../../.cache/servers

command -v nginx >/dev/null || ../../deploy/packages.sh "nginx (tests read frames from it)" nginx-light
command -v openssl >/dev/null || ../../deploy/packages.sh "openssl (it signs the certificate of a test)" openssl

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# fetch WHAT COMMAND…: run the command, quietly unless it fails.
fetch() {
    local what=$1
    shift
    echo "stampworker: fetching $what (a minute or two)" >&2
    mkdir -p "$cache"
    if ! "$@" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "stampworker: $what could not be fetched; see above." >&2
        exit 1
    fi
}

# with_go PROGRAM MODULE WHAT: build a program that is not here.
with_go() {
    if command -v "$1" >/dev/null || [ -x "$cache/$1" ]; then
        return
    fi
    # From 1.21 on Go fetches the newer version of itself that a module asks for.
    if ! command -v go >/dev/null || ! printf '%s\n' go1.21 "$(go env GOVERSION)" | sort -V -C; then
        echo "stampworker: no Go from 1.21 on, so no $3; the tests that need it will be skipped." >&2
        return
    fi
    fetch "$3 with Go: $2" env GOBIN="$cache" go install "$2"
}

with_go versitygw github.com/versity/versitygw/cmd/versitygw@v1.8.0 "Versity S3 Gateway"
with_go fake-gcs-server github.com/fsouza/fake-gcs-server@v1.56.1 "fake-gcs-server"

if command -v azurite-blob >/dev/null || [ -x "$cache/node_modules/.bin/azurite-blob" ]; then
    exit
fi
if ! command -v npm >/dev/null; then
    echo "stampworker: no npm, so no Azurite; the tests that need it will be skipped." >&2
    exit
fi
fetch "Azurite with npm" npm install --prefix "$cache" --no-audit --no-fund --omit=optional azurite@3.35.0
