#!/bin/sh
# Removes from a virtual environment what serving never reads, then compiles the rest: a read-only root cannot cache it.
set -eu
site=$(echo "$1"/lib/python3*/site-packages)
find "$site" -type d -name __pycache__ -prune -exec rm -rf {} +
find "$site" -type d \( -name tests -o -name testing \) -path '*/numpy/*' -prune -exec rm -rf {} +
rm -rf "$site"/onnx/backend/test "$site"/onnx/test "$site"/numpy/f2py "$site"/grpc_tools "$site"/onnxruntime/transformers \
  "$site"/onnxruntime/quantization "$site"/onnxruntime/tools "$site"/onnxruntime/datasets
find "$site" -type f \( -name '*.pyi' -o -name '*.a' -o -name '*.h' -o -name '*.hpp' -o -name '*.proto' -o -name '*.pxd' \) -delete
"$1"/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash "$site"
