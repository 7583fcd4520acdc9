"""`make bench-serve`: what the server costs and bears, on a CIFAR ResNet-20 (3x32x32), a ResNet-50 and a tiny network.

    python -m tests.bench.serve                              # all but the peers: about 12 minutes on two cores
    python -m tests.bench.serve --parts throughput,resnet50
    python -m tests.bench.serve --parts peers --venvs DIR    # installs LitServe, MLServer, KServe, PyTriton in DIR

Needs wrk (apt-get install wrk). Exit 1 when overload or soak misses a goal; the throughputs are printed, not judged.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

import gmconv
from export.onnx.pipeline import export_onnx

HERE = Path(__file__).parent
NETWORKS = {
    "resnet20": ("resnet20", (3, 32, 32)),
    "resnet50": ("resnet50", (3, 224, 224)),
    "tiny": ("resnet20", (3, 8, 8)),
}
PARTS: dict[str, tuple[str, str, list[str]]] = {  # network, script, flags
    "throughput": ("resnet20", "serve_throughput", []),
    "one thread": ("resnet20", "serve_throughput", ["--threads", "1"]),
    "resnet50": ("resnet50", "serve_throughput", ["--clients", "8", "--seconds", "8"]),
    "overload": ("resnet20", "serve_overload", []),
    "soak": ("tiny", "serve_soak", []),
    "peers": ("resnet20", "serve_peers", []),
}


def artefact(network: str, folder: Path) -> Path:
    """An exported network with random weights; what the weights are does not matter for time."""
    name, shape = NETWORKS[network]
    path = folder / f"{network}.onnx"
    if not path.exists():
        checkpoint = path.with_suffix(".pt")
        gmconv.save_checkpoint(checkpoint, gmconv.models.create(name), f"gmconv.models:{name}", shape)
        export_onnx(checkpoint, path)
    return path


@click.command()
@click.option("--parts", default=",".join(p for p in PARTS if p != "peers"), show_default=True)
@click.option("--venvs", type=click.Path(path_type=Path), help="Where the peers' virtual environments are kept.")
def main(parts: str, venvs: Path | None) -> None:
    """Run the parts one after another."""
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts.split(","):
            network, script, flags = PARTS[part]
            flags = [*flags, "--venvs", str(venvs)] if part == "peers" and venvs else flags
            print(f"\n# {part}: {network}", flush=True)
            start = time.monotonic()
            command = [sys.executable, str(HERE / f"{script}.py"), str(artefact(network, Path(folder))), *flags]
            codes.append(subprocess.run(command, check=False).returncode)
            print(f"# {time.monotonic() - start:.0f} s, exit {codes[-1]}", flush=True)
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
