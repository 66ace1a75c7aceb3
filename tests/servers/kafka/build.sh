#!/usr/bin/env bash
# Make a Kafka image from this distribution's Java and Kafka's jars from Maven: build.sh IMAGE VERSION
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

image=$1
version=$2

command -v mvn >/dev/null || ../../../deploy/packages.sh "Maven (it fetches Kafka's jars)" maven
java=
for candidate in openjdk-17-jre-headless openjdk-21-jre-headless openjdk-25-jre-headless; do
    if apt-cache show "$candidate" >/dev/null 2>&1; then
        java=$candidate
        break
    fi
done
if [ -z "$java" ]; then
    echo "stampworker: apt has no Java 17 or later for a Kafka image" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
base=stampworker-java:${java//[^0-9]/}
../../../deploy/base.sh "$base" "$java" bash

echo "stampworker: making the image $image (Kafka's jars from Maven)" >&2
cp Dockerfile start server.properties log4j2.properties pom.xml "$work"
quietly() {
    if ! "$@" >"$work/log" 2>&1; then
        tail -n 20 "$work/log" >&2
        echo "stampworker: $1 failed; see above." >&2
        exit 1
    fi
}
quietly mvn -B -f "$work/pom.xml" -Dkafka.version="$version" dependency:copy-dependencies \
    -DincludeScope=runtime -DoutputDirectory="$work/libs"
# The older builder, which every engine has.
DOCKER_BUILDKIT=0 quietly docker build -t "$image" --build-arg BASE="$base" "$work"
