#!/bin/sh
# Writes the hash-locked requirements of the image: docker/requirements-*.txt. Usage: docker/lock.sh [PYTHON]
# PYTHON is the environment that the tests ran in; the lock takes its versions where it has them. Needs `pip install uv`.
set -eu
cd "$(dirname "$0")/.."
python=${1:-python}
tested=$(mktemp)
trap 'rm -f "$tested"' EXIT
"$python" -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==[0-9.]+$' >"$tested"

lock() {
  output=docker/requirements-$1.txt
  shift
  "$python" -m uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_34 --generate-hashes \
    --constraint "$tested" --no-annotate --custom-compile-command "make lock-image" --output-file "$output" "$@"
  echo "$output: $(grep -c '^[a-z0-9].*==' "$output") packages"
}

for name in ${LOCKS:-cpu gpu tensorrt rtx tools}; do
  case $name in
    cpu) lock cpu pyproject.toml --extra serve --extra otel --extra cpu ;;
    gpu) lock gpu pyproject.toml docker/gpu.in --extra serve --extra otel --extra gpu ;;
    tensorrt | rtx) lock "$name" pyproject.toml docker/engines.in --extra serve --extra otel --extra "$name" --extra cuda ;;
    *) lock "$name" "docker/requirements-$name.in" ;;
  esac
done
