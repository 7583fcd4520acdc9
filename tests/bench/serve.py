"""`make bench-serve`: the server on a CIFAR ResNet-20 (3x32x32): throughput, overload, soak. Needs wrk (Debian)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import gmconv
from export.onnx import export_onnx

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        checkpoint, artefact = Path(name) / "resnet20.pt", Path(name) / "resnet20.onnx"
        model = gmconv.models.create("resnet20")
        gmconv.save_checkpoint(checkpoint, model, "gmconv.models:resnet20", (3, 32, 32))
        export_onnx(checkpoint, artefact)
        codes = [
            subprocess.run([sys.executable, "-m", f"tests.bench.{part}", str(artefact)]).returncode
            for part in ("serve_throughput", "serve_overload", "serve_soak")
        ]
        sys.exit(max(codes))
