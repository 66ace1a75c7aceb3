#!/usr/bin/env bash
# Print the name of a Kafka image that the Docker engine here has, fetching or making it where needed.
#   image.sh          the image that STAMPWORKER_TEST_KAFKA_IMAGE names; else the official one, pulled where it can be;
#                     else one made here, of Debian's or Ubuntu's Java and Kafka's jars from Maven, once
#   image.sh --find   fetch and make nothing: fail where there is none yet
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

version=4.1.1
official=apache/kafka:$version
recipe=$(cat build.sh Dockerfile start pom.xml server.properties log4j2.properties ../../../deploy/base.sh | sha256sum | cut -c 1-12)
local=stampworker-kafka:$version-$recipe

have() {
    docker image inspect "$1" >/dev/null 2>&1
}

pull() {
    echo "stampworker: pulling the image $1" >&2
    timeout "${2}" docker pull --quiet "$1" >/dev/null
}

if [ -n "${STAMPWORKER_TEST_KAFKA_IMAGE:-}" ]; then
    if ! have "$STAMPWORKER_TEST_KAFKA_IMAGE" && ! pull "$STAMPWORKER_TEST_KAFKA_IMAGE" 600; then
        echo "stampworker: no image $STAMPWORKER_TEST_KAFKA_IMAGE here, nor can it be pulled. Name another in" \
            "STAMPWORKER_TEST_KAFKA_IMAGE, or unset it." >&2
        exit 1
    fi
    echo "$STAMPWORKER_TEST_KAFKA_IMAGE"
elif have $official; then
    echo $official
elif have "$local"; then
    echo "$local"
elif [ "${1:-}" = --find ]; then
    echo "stampworker: there is no Kafka image yet. Run: deploy/engine.sh && tests/servers/kafka/image.sh (or: make test)." >&2
    exit 1
elif pull $official 180; then
    echo $official
else
    echo "stampworker: $official cannot be pulled" >&2
    if ! ./build.sh "$local" $version; then
        echo "stampworker: nor can a Kafka image be made here. Load one (docker load) and name it in" \
            "STAMPWORKER_TEST_KAFKA_IMAGE." >&2
        exit 1
    fi
    echo "$local"
fi
