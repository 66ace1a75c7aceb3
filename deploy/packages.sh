#!/usr/bin/env bash
# Install packages of the distribution, having said so: packages.sh "what for" PACKAGE…
# Only root on Debian or Ubuntu gets them installed; anyone else is told the command, and the script ends with 1.
set -euo pipefail

purpose=$1
shift

family=$(. /etc/os-release 2>/dev/null && echo "${ID:-} ${ID_LIKE:-}") || family=
case " $family " in
    *" debian "* | *" ubuntu "*) ;;
    *)
        echo "stampworker: $purpose is missing. Install it the way this system does (Debian calls it: $*), then repeat." >&2
        exit 1
        ;;
esac
if [ "$(id -u)" != 0 ]; then
    echo "stampworker: $purpose is missing. As root, run: apt-get install $*" >&2
    exit 1
fi

echo "stampworker: $purpose is missing; installing with apt-get: $*" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && apt-get install -y --no-install-recommends "$@"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "stampworker: apt-get could not install $*; see above." >&2
    exit 1
fi
