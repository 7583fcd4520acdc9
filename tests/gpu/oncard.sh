#!/usr/bin/env bash
# oncard.sh 1|2 CARRIED OUT [ARGUMENTS]: on the card's machine, the first or the second half of the proof.
# CARRIED: the folder of carry.sh, or its half. What the first call leaves in KEPT is used by the second.
set -euo pipefail
half=$1 carried=$2 out=$3
shift 3
kept=${KEPT:-/tmp/kept}
cd "$(dirname "$0")/../.."
mkdir -p "$kept"/{wheels,site}
cp -r "$carried/$half/." "$kept/"
touch tests/__init__.py # or a folder "tests" among the machine's packages comes before this one
unpack() { # the archive $1 into $2, by all cores where xz is there
  mkdir -p "$2"
  if command -v xz >/dev/null; then xz -dc -T0 "$1" | tar x -C "$2"; else python3 -m tarfile -e "$1" "$2"; fi
}
if [ "$half" = 1 ]; then
  steps=driver,parity,latency budget=330
else
  steps=engines,comparison,serving,providers,accuracy budget=440
  if [ ! -e "$kept/library.1" ]; then
    echo "$kept has nothing of the first call: another machine? make that call again" >&2
    exit 2
  fi
  cat "$kept"/library.[12] >"$kept/library.tar.xz"
  unpack "$kept/library.tar.xz" "$kept/site"
fi
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$kept/site" "$kept"/wheels/*.whl
if [ -f "$kept/photographs.tar.xz" ]; then
  unpack "$kept/photographs.tar.xz" "$kept/photographs"
  set -- --images "$kept/photographs" "$@"
fi
PYTHONPATH=$kept/site PYTHONUNBUFFERED=1 exec python3 -m tests.gpu.proof \
  --steps "$steps" --budget "$budget" --artefacts "$kept/artefacts" --work "$kept/work" --out "$out" "$@"
