#!/usr/bin/env bash
# Say what for, and install packages of the distribution: packages.sh "what for" PACKAGE…
# It installs as root on Debian or Ubuntu only. Elsewhere it prints the command, and ends with 1.
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
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
if ! { "$here/apt_get.sh" update && "$here/apt_get.sh" install -y --no-install-recommends "$@"; }; then
    echo "stampworker: apt-get could not install $*; see above." >&2
    exit 1
fi
