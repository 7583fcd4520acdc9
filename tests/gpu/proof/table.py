"""`proof.json` and the README's table, from the rows."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.bench.readme import write_block
from tests.bench.write import fenced
from tests.gpu.proof.rows import Row
from tests.gpu.proof.steps import STEPS

ROOT = Path(__file__).parents[3]
PROOF = ROOT / "tests" / "gpu" / "proof.json"
README = ROOT / "README.md"
BLOCK = "proof-gpu"
FLAVORS = {"torch": "PyTorch", "tensorrt": "TensorRT", "rtx": "TensorRT-RTX", "onnxruntime": "ONNX Runtime, CUDA"}
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
#: What the default tests verify without a card.
WITHOUT = {
    "torch": "CPU: live = baked bitwise, all tolerances",
    "tensorrt": "doubles with the real bindings' names",
    "rtx": "built without a GPU, precision read back from the build",
    "onnxruntime": "on the CPU provider",
}
NOT_RUN = "not run yet"
#: The folders before a file's name, where a path begins at the root; no URL, and no "REST/gRPC".
_FOLDERS = re.compile(r"(?<![\w.:/])(?:/[\w.+~-]+)+/(?=\w)")


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of each step's last run, in the order of the steps."""
    runs: dict[str, list[Row]] = {}
    fresh: set[str] = set()
    for row in rows:
        if row.step not in runs or row.step in fresh:
            runs[row.step] = []
            fresh.discard(row.step)
        runs[row.step].append(row)
        if row.what == "step":
            fresh.add(row.step)
    order = ["machine", *(step.name for step in STEPS)]
    return [row for name in order for row in runs.get(name, [])]


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """`proof.json`: the machine, the date, and every row of each step's last run."""
    kept = latest(rows)
    machine = next((row.figures for row in kept if row.step == "machine" and row.what == "machine"), {})
    return {
        "schema": "gmconv-deploy/proof/1",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "rows": [asdict(row) for row in kept if row.step != "machine"],
    }


def write(folder: Path, rows: Sequence[Row]) -> None:
    """`proof.json` and `table.md` in `folder`."""
    found = document(rows)
    (folder / "proof.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    (folder / "table.md").write_text("\n".join(lines(found)) + "\n")


def publish(rows: Sequence[Row]) -> None:
    """Keep the results: `tests/gpu/proof.json`, and the README's block; of a path of the card's machine the name."""
    shown = [replace(row, detail=_FOLDERS.sub("", row.detail)) for row in rows]
    PROOF.write_text(json.dumps(document(shown), indent=1, default=str) + "\n")
    write_block(README, BLOCK, lines(published()))


def published() -> dict[str, Any] | None:
    """The results that were kept, or None where no card was at hand yet."""
    return json.loads(PROOF.read_text()) if PROOF.exists() else None


def lines(found: dict[str, Any] | None) -> list[str]:
    """The README's table: flavor x precision x what was verified where; each step; each check; their own tables."""
    rows = [Row(**row) for row in found["rows"]] if found else []
    machine = found["machine"] if found else {}
    head = [_title(found, machine), ""]
    head += ["| flavor | precision | without a card | on the card |", "|---|---|---|---|"]
    for flavor, title in FLAVORS.items():
        cells: dict[str, list[str]] = {}  # precisions of which the same is to be said share a line
        for precision in PRECISIONS:
            about = [row for row in rows if (row.flavor, row.precision) == (flavor, precision)]
            cells.setdefault(_cell(about), []).append(precision)
        head += [f"| {title} | {', '.join(names)} | {WITHOUT[flavor]} | {cell} |" for cell, names in cells.items()]
    if not found:
        return head
    head += ["", "| step | result | s |", "|---|---|---|"]
    for row in rows:
        if row.what == "step":
            head.append(f"| {row.step} | {row.status}: {_plain(row.detail)} | {row.seconds:.0f} |")
    others = [row for row in rows if row.what != "step" and not (row.flavor and row.precision)]
    if others:
        head += ["", "| step | check | result |", "|---|---|---|"]
        head += [f"| {row.step} | {_plain(row.what)} | {_verdict(row)} |" for row in others]
    tables = [line for row in others for line in row.figures.get("table", ())]
    return [*head, "", *fenced(tables)] if tables else head


def _title(found: dict[str, Any] | None, machine: dict[str, Any]) -> str:
    if not found:
        return f"On a card: {NOT_RUN} (`make proof-gpu`; its rehearsal on the CPU is a test)."
    if machine.get("rehearsal"):
        return "A rehearsal on the CPU, with stand-ins: it proves nothing about a card."
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    return (
        f"{found['date']}, {machine.get('gpu', 'no GPU')} (compute capability {machine.get('compute_capability')}), "
        f"driver {machine.get('driver')}, CUDA {machine.get('cuda')}, Python {machine.get('python')}, {versions}:"
    )


def _cell(about: Sequence[Row]) -> str:
    return "; ".join(f"{_plain(row.what)}: {_verdict(row)}" for row in about) or NOT_RUN


def _verdict(row: Row) -> str:
    words = {"passed": "ok", "measured": "", "failed": "**failed**"}.get(row.status, row.status)
    return " ".join(part for part in (words, _plain(row.detail)) if part)


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
