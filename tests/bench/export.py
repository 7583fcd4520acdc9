"""`make bench-export`: what the proof costs: export.onnx against ten lines that only call torch.onnx.export.

Whole processes, interleaved, wall time and peak resident memory of the largest process; medians of the pairwise
ratios. The goal is at most 1.25 for each.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import click

from tests.bench.engine import cost

BARE = """
import sys, torch, gmconv
model = gmconv.load_checkpoint(sys.argv[1]).model
torch.onnx.export(model.eval(), (torch.randn(2, 3, 224, 224),), sys.argv[2], dynamo=True, verbose=False,
                  dynamic_shapes=({0: "batch"},), external_data=False)
"""
GOAL = 1.25


@click.command()
@click.option("--networks", default="resnet50,alexnet", show_default=True)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Counted pairs, after one warm-up.")
def main(networks: str, runs: int) -> None:
    """Measure, print a line for each network, exit 1 when a ratio is over its goal."""
    import gmconv

    short = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE)
        for network in networks.split(","):
            checkpoint = folder / f"{network}.pt"
            model = gmconv.models.create(network)
            gmconv.save_checkpoint(checkpoint, model, f"gmconv.models:{network}", (3, 224, 224))
            ours = [sys.executable, "-m", "export.onnx", str(checkpoint), "-o", str(folder / "ours.onnx")]
            bare = [sys.executable, str(folder / "bare.py"), str(checkpoint), str(folder / "bare.onnx")]
            pairs = [(cost(ours), cost(bare)) for _ in range(runs + 1)][1:]
            wall, memory = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
            seconds, mebibytes = (statistics.median(a[i] for a, _ in pairs) for i in (0, 1))
            print(
                f"{network}: export with proof takes {wall:.2f}x the wall time ({seconds:.1f} s) and {memory:.2f}x "
                f"the peak memory ({mebibytes / 1024:.0f} MiB) of the bare exporter; goal {GOAL}"
            )
            short += [network] * (max(wall, memory) > GOAL)
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
