#!/usr/bin/env bash
# Make an image of this machine's distribution, where none can be pulled: base.sh IMAGE PACKAGE…
# The packages come through apt's settings on this machine: its mirrors, its proxies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

image=$1
shift
packages=$(IFS=,; echo "$*")

command -v mmdebstrap >/dev/null || ./packages.sh "mmdebstrap (it makes images)" mmdebstrap
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

. /etc/os-release
# The distribution's own archives as apt is configured here, without what other parties add.
targets() {
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' "Origin: ${ID^}" | sort -u
}
targets >"$work/sources.list"
if [ ! -s "$work/sources.list" ] && [ "$(id -u)" = 0 ]; then
    ./apt_get.sh update # Without lists, as on a new system, apt does not know the origin of an archive.
    targets >"$work/sources.list"
fi
apt-config dump | grep -iE '^Acquire::(https?|Retries)' >"$work/apt.conf" || true # Proxies and the like, or nothing.

sources=()
if [ -s "$work/sources.list" ]; then
    sources=("$work/sources.list")
fi
echo "stampworker: making the image $image ($PRETTY_NAME with $*)" >&2
if ! mmdebstrap --variant=minbase --include="$packages" --aptopt="$work/apt.conf" \
    --customize-hook='rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*' \
    "$VERSION_CODENAME" "$work/rootfs.tar" "${sources[@]}" >"$work/log" 2>&1; then
    tail -n 20 "$work/log" >&2
    echo "stampworker: mmdebstrap failed; see above." >&2
    exit 1
fi
docker import "$work/rootfs.tar" "$image" >/dev/null
