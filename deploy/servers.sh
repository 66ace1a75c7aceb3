#!/usr/bin/env bash
# Make sure that the real servers of frames that the tests start are here: nginx, openssl (for its certificate), and,
# where Go is, the Versity S3 Gateway, built into .cache. None is left running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH=$PATH:/usr/sbin

gateway=github.com/versity/versitygw/cmd/versitygw@v1.8.0
cache=$PWD/../.cache/servers

command -v nginx >/dev/null || ./packages.sh "nginx (tests read frames from it)" nginx-light
command -v openssl >/dev/null || ./packages.sh "openssl (it signs the certificate of a test)" openssl

if command -v versitygw >/dev/null || [ -x "$cache/versitygw" ]; then
    exit
fi
# From 1.21 on Go fetches the newer version of itself that a module asks for.
if ! command -v go >/dev/null || ! printf '%s\n' go1.21 "$(go env GOVERSION)" | sort -V -C; then
    echo "stampworker: no Go from 1.21 on, so no Versity S3 Gateway; the tests that need it will be skipped." >&2
    exit
fi
echo "stampworker: building the Versity S3 Gateway with Go (a minute or two): $gateway" >&2
mkdir -p "$cache"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! GOBIN=$cache go install "$gateway" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "stampworker: the Versity S3 Gateway could not be built; see above." >&2
    exit 1
fi
