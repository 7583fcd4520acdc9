"""Step e: the engine against the network as it was trained, interleaved, in one clock: what the project is for."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from runtime import trt
from runtime.manifest import read_manifest
from tests.gpu.proof import artefacts
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context

BATCHES = (1, 32)


def run(context: Context, recorder: Recorder) -> None:
    """`runtime.benchmark` on the checkpoint and each engine, at two batches; then on their plain twins."""
    with contextlib.ExitStack() as stack:
        if context.rehearse:
            from tests.gpu.proof.rehearsal import driver_double, engines_on_onnxruntime

            stack.enter_context(driver_double(context.work))
            stack.enter_context(engines_on_onnxruntime(artefacts.onnx_file(context)))
        flavors: tuple[trt.Flavor, ...] = ("rtx",) if context.rehearse else ("rtx", "tensorrt")
        for flavor in flavors:
            for precision in ("fp32",) if context.rehearse else ("fp32", "fp16"):
                plans: list[Path] = []
                with recorder.check("an engine to compare", flavor=flavor, precision=precision) as figures:
                    recorder.need(5)
                    trt.api(flavor)
                    plan, figures["detail"] = artefacts.engine(context, flavor, precision)
                    plans.append(plan)
                for plan in plans:
                    for batch in BATCHES[: 1 if context.rehearse else None]:
                        against_live(context, recorder, plan, batch, flavor=flavor, precision=precision)
                    if precision == "fp32" and not context.rehearse:  # its export and its build have tests of their own
                        against_twin(context, recorder, plan, flavor=flavor, precision=precision)


def against_live(context: Context, recorder: Recorder, plan: Path, batch: int, **about: str) -> None:
    """The network as trained, eager and as a graph, the baked one, the engine as a graph and without."""
    with recorder.check(f"engine against live, batch {batch}", **about) as figures:
        recorder.need(10)
        live = f"{artefacts.checkpoint(context)}@device={context.device}"
        named = [f"{live},cuda_graph=false", f"{live},cuda_graph=true", f"{live},form=baked,cuda_graph=true"]
        if context.rehearse:  # torch records no graphs on a CPU
            named = [live, f"{live},form=baked"]
        named += [f"{plan}@cuda_graph=true", f"{plan}@cuda_graph=false"]
        found = compare([*named, *loop(context, plan, batch)])
        rows = found["artefacts"]
        ratio = rows[-2]["ratio"]
        report(figures, found)
        if not context.rehearse:
            require(len({row["mode"]["clock"] for row in rows}) == 1, "the artefacts were timed by several clocks")
            require(ratio["high"] < 1, f"the engine is not faster than the live network: {figures['detail']}")


def against_twin(context: Context, recorder: Recorder, plan: Path, **about: str) -> None:
    """What the masks cost, and what is left of it in the engine: `--twin`, which exports and builds the twin."""
    with recorder.check("engine against its plain twin, batch 8", **about) as figures:
        recorder.need(45)
        live = f"{artefacts.checkpoint(context)}@device={context.device},cuda_graph=false"
        found = compare([live, f"{plan}@cuda_graph=true", "--twin", *loop(context, plan, 8)])
        report(figures, found)
        ratio = found["artefacts"][-1]["ratio"]
        require(ratio is not None, f"there is no twin: {found['artefacts'][-1].get('no_twin')}")
        require(ratio["low"] <= 1.05, f"the engine takes at least {ratio['low']:.3f} of its plain twin's time")


def loop(context: Context, plan: Path, batch: int) -> list[str]:
    """How long and on what."""
    spec = read_manifest(plan).inputs[0]
    size = "x".join(map(str, (batch, *spec.shape[1:])))
    return ["--shapes", f"{spec.name}:{size}", "--duration", "0.02" if context.rehearse else "1.0", "--iterations", "5"]


def report(figures: dict[str, Any], found: dict[str, Any]) -> None:
    """A comparison's rows as figures and in words."""
    rows = found["artefacts"]
    figures["rows"] = [
        {key: row[key] for key in ("artefact", "latency_ms", "reference", "ratio", "over_live")} for row in rows
    ]
    figures["warnings"] = found["warnings"]
    said = []
    for row in rows:
        ratio = f" ({row['ratio']['value']:.3f} of {row['reference']})" if row["ratio"] else ""
        said.append(f"{row['artefact']} {row['latency_ms']['median']:.4g} ms{ratio}")
    figures["detail"] = "; ".join(said)


def compare(arguments: list[str]) -> dict[str, Any]:
    """`python -m runtime.benchmark ARGUMENTS --json`, in this process."""
    from runtime.benchmark.__main__ import main

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            main([*arguments, "--json"])
    except SystemExit as done:  # a command always ends so
        require(not done.code, f"runtime.benchmark ended with {done.code}")
    text = output.getvalue()
    document: dict[str, Any] = json.loads(text[text.index("{") :])
    return document
