#!/usr/bin/env bash
# Install packages of the distribution, having said so: packages.sh "what for" PACKAGE…
# Only root on Debian or Ubuntu gets them installed; anyone else is told the command, and the script ends with 1.
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
