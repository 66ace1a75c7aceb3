#!/usr/bin/env bash
# Make the worker's image: image.sh [NAME]
# BASE and BUILD_BASE name other base images than the official Python's (see Dockerfile). Where those can't be pulled,
# some are made of this machine's own distribution. The wheels are fetched here, so that the image needs no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1:-stampworker}
python=${PYTHON:-python3}

have() {
    docker image inspect "$1" >/dev/null 2>&1
}

pull() {
    echo "stampworker: pulling the image $1" >&2
    timeout 300 docker pull --quiet "$1" >/dev/null
}

deploy/engine.sh
made=stampworker-python:$(. /etc/os-release && echo "${VERSION_CODENAME:-none}")
if [ -n "${BASE:-}" ]; then
    BUILD_BASE=${BUILD_BASE:-$BASE}
elif ! have "$made" && { have python:3.12-slim || pull python:3.12-slim; } && { have python:3.12 || pull python:3.12; }; then
    BASE=python:3.12-slim
    BUILD_BASE=python:3.12
else
    BASE=$made
    BUILD_BASE=$made-build
    have "$BASE" || deploy/base.sh "$BASE" python3 python3-venv ca-certificates
    have "$BUILD_BASE" || deploy/base.sh "$BUILD_BASE" python3 python3-venv python3-dev gcc libc6-dev
fi

version=$(docker run --rm --entrypoint python3 "$BASE" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
echo "stampworker: fetching wheels for Python $version" >&2
rm -rf build/wheels
build_tools=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
# shellcheck disable=SC2086 # several words
"$python" -m pip download --disable-pip-version-check --quiet --dest build/wheels -c constraints.txt \
    --python-version "$version" --only-binary :all: '.[s3]' $build_tools

echo "stampworker: making the image $name from $BASE" >&2
docker build --build-arg BASE="$BASE" --build-arg BUILD_BASE="$BUILD_BASE" --build-arg PIP_NO_INDEX=1 --network none \
    -f deploy/Dockerfile -t "$name" .
