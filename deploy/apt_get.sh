#!/usr/bin/env bash
# Run apt-get, quietly unless it fails, and wait up to five minutes for another apt to end: apt_get.sh ARGUMENT…
# A machine that has just started installs its upgrades. apt-get can wait for dpkg's lock, but not for those of its
# lists and its archives. This waits for all three.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C # the message below, untranslated

log=$(mktemp)
trap 'rm -f "$log"' EXIT
waiting=
until apt-get "$@" >"$log" 2>&1; do
    if ! grep -q 'Could not get lock' "$log" || ((SECONDS >= 300)); then
        tail -n 20 "$log" >&2
        exit 1
    fi
    if [ -z "$waiting" ]; then
        waiting=yes
        echo "stampworker: another apt is at work; waiting for it to end" >&2
    fi
    sleep 1
done
