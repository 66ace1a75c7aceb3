#!/usr/bin/env bash
# Make sure that a Docker engine answers: use the one that does, else install and start the distribution's (as root on
# Debian or Ubuntu; other users see the command). The engine keeps running afterwards, as a system service does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

log=/var/log/stampworker-dockerd.log

answers() {
    command -v docker >/dev/null && timeout 20 docker info >/dev/null 2>&1
}

wait_until_it_answers() {
    for _ in $(seq 120); do
        if answers; then
            return
        fi
        sleep 0.5
    done
    return 1
}

if answers; then
    exit
fi
if [ -n "${DOCKER_HOST:-}" ]; then
    echo "stampworker: no Docker engine answers at DOCKER_HOST=$DOCKER_HOST. Start it, or unset DOCKER_HOST." >&2
    exit 1
fi
if command -v dockerd >/dev/null && [ "$(id -u)" != 0 ]; then
    echo "stampworker: no Docker engine answers $(id -un). As root, run: systemctl start docker (or: dockerd &)," \
        "and, for an account of its own: usermod -aG docker $(id -un)" >&2
    exit 1
fi
if ! command -v dockerd >/dev/null || ! command -v docker >/dev/null; then
    packages=(docker.io iptables)
    # From Debian 13 on the client is a package of its own.
    if ! command -v docker >/dev/null && apt-cache show docker-cli >/dev/null 2>&1; then
        packages+=(docker-cli)
    fi
    ./packages.sh "a Docker engine" "${packages[@]}"
fi

if [ -d /run/systemd/system ]; then
    echo "stampworker: starting the Docker engine: systemctl start docker" >&2
    systemctl start docker
elif ! answers; then
    echo "stampworker: starting the Docker engine: dockerd (log: $log; to stop it: kill \$(cat /var/run/docker.pid))" >&2
    # A new session without this script's descriptors: who waits for the script's output must not wait for dockerd.
    setsid dockerd >"$log" 2>&1 </dev/null &
fi
if ! wait_until_it_answers; then
    [ ! -f "$log" ] || tail -n 20 "$log" >&2
    echo "stampworker: the Docker engine does not answer after a minute; docker info says:" >&2
    docker info >&2 || true
    exit 1
fi
