#!/usr/bin/env bash
# carry.sh FOLDER [PHOTOGRAPHS]: what a card's machine without a network needs, in two parts of at most some 60 MiB.
# FOLDER/1 goes with the first call, FOLDER/2 with the second; oncard.sh uses them there. PHOTOGRAPHS: a folder with train
# and test, of which a part is taken along. PY: the version of Python there.
set -euo pipefail
folder=$1 photographs=${2:-} PY=${PY:-3.12}
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$folder"/{1,2}/wheels "$folder"/made
folder=$(cd "$folder" && pwd)
platforms=$(printf -- '--platform manylinux%s_x86_64 ' 2014 _2_17 _2_24 _2_27 _2_28)
version=$("$python" -c 'import importlib.metadata as m; print(m.version("tensorrt-rtx"))')

fetch() { # into $1: the wheels of the rest
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$PY" --implementation cp $platforms -d "$@"
}
fetch "$folder/1/wheels" msgspec onnxslim starlette uvicorn httptools tritonclient python-rapidjson
fetch "$folder/2/wheels" "tensorrt-rtx-cu13-bindings==$version"
"$python" -m pip wheel -q --no-deps -w "$folder/2/wheels" "tensorrt-rtx==$version" "tensorrt-rtx-cu13==$version"
fetch "$folder/made" "tensorrt-rtx-cu13-libs==$version"

(cd "$root" && "$python" -m tests.gpu.proof.artefacts "$folder/1/artefacts")
if [ -n "$photographs" ]; then # 10,000 and 2,500 of ten classes of small files: 11 MiB
  (cd "$photographs" && for part in train:1000 test:250; do
    for class in "${part%:*}"/*/; do find "$class" -type f | sort | sed -n "1,${part#*:}p"; done
  done | tar cf "$folder/1/photographs.tar" -T -)
fi
# The large library is cut so that both parts weigh the same.
library=$(ls "$folder"/made/*.whl)
size() { du -sb "$1" | cut -f1; }
first=$((($(size "$folder/1") + $(size "$folder/2") + $(size "$library")) / 2 - $(size "$folder/1")))
head -c "$first" "$library" >"$folder/1/$(basename "$library").1"
tail -c +$((first + 1)) "$library" >"$folder/2/$(basename "$library").2"
rm -r "$folder/made"
du -sh "$folder/1" "$folder/2"
