#!/usr/bin/env bash
# carry.sh FOLDER [PHOTOGRAPHS]: what a card's machine without a network needs, in two parts of at most some 60 MiB.
# FOLDER/1 goes with the first call, FOLDER/2 with the second; oncard.sh uses them there. PHOTOGRAPHS: a folder with train
# and test, of which a part is taken along. PY: the version of Python there.
set -euo pipefail
folder=$1 photographs=${2:-} PY=${PY:-3.12}
python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/../.." && pwd)
for part in train test; do # asked now, not after a minute of downloads
  if [ -n "$photographs" ] && [ ! -d "$photographs/$part" ]; then
    echo "$photographs: no folder $part, with a folder of photographs for each class, is in it" >&2
    exit 2
  fi
done
# On the machine already; of everything else that the steps import the versions go along that are tested here.
has=(aiohttp certifi click colorama cuda-bindings ml-dtypes numpy nvidia-ml-py onnx onnxruntime packaging pillow
  prometheus-client rich safetensors scikit-learn sympy torch typing-extensions urllib3 uvloop)
carried=(brotli gevent geventhttpclient greenlet grpcio grpcio-health-checking grpcio-reflection h2 hpack httptools
  hyperframe msgspec onnx-ir onnxscript onnxslim protobuf python-rapidjson tritonclient zope.event zope.interface)
rm -rf "$folder"/{1,2,made} # wheels of an earlier run would travel too, and pip refuses two versions of one
mkdir -p "$folder"/{1,2}/wheels "$folder"/made
folder=$(cd "$folder" && pwd)
platforms=$(printf -- '--platform manylinux%s_x86_64 ' 2014 _2_17 _2_24 _2_27 _2_28)
version=$("$python" -c 'import importlib.metadata as m; print(m.version("tensorrt-rtx"))')

fetch() { # into $1: the wheels of the rest
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$PY" --implementation cp $platforms \
    -c "$root/constraints.txt" -d "$@"
}
echo "not carried: ${has[*]}"
fetch "$folder/1/wheels" "${carried[@]}"
fetch "$folder/2/wheels" "tensorrt-rtx-cu13-bindings==$version"
"$python" -m pip wheel -q --no-deps -w "$folder/2/wheels" "tensorrt-rtx==$version" "tensorrt-rtx-cu13==$version"
fetch "$folder/made" "tensorrt-rtx-cu13-libs==$version"
(cd "$root" && "$python" -m tests.gpu.proof.artefacts "$folder/1/artefacts")
if [ -n "$photographs" ]; then # of ten classes 20,000 and 5,000: 8 MiB where they are small
  (cd "$photographs" && for part in train:2000 test:500; do
    for class in "${part%:*}"/*/; do find "$class" -type f | sort | sed -n "1,${part#*:}p"; done
  done | tar c -T - | xz -T0 >"$folder/1/photographs.tar.xz")
fi
# The large library is packed tighter than in its wheel (72 MiB of 91; 65 with -6, in three times the time), and cut
# so that both parts weigh the same.
library=$folder/made/library.tar.xz
"$python" -m zipfile -e "$folder"/made/*.whl "$folder/made/library"
tar c -C "$folder/made/library" . | xz -T0 -2 >"$library"
size() { du -sb "$1" | cut -f1; }
first=$((($(size "$folder/1") + $(size "$folder/2") + $(size "$library")) / 2 - $(size "$folder/1")))
head -c "$first" "$library" >"$folder/1/library.1"
tail -c +$((first + 1)) "$library" >"$folder/2/library.2"
rm -r "$folder/made"
du -sh "$folder/1" "$folder/2"
