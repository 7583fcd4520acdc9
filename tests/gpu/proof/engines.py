"""Step d: each engine against the live network, then what every engine must hold.

Validity is asked first and recorded; it does not decide: engines that it called invalid have been seen to run.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from runtime import cuda, trt
from runtime.manifest import read_manifest
from runtime.parity.run import ParityOptions, ParityReport, compare_artefacts
from tests.gpu.proof import artefacts
from tests.gpu.proof.engine_checks import check_engine
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context

FLAVORS: tuple[trt.Flavor, ...] = ("rtx", "tensorrt")
#: The precisions whose engines go through every check of `engine_checks`.
WHOLE = ("fp32", "int8")


def run(context: Context, recorder: Recorder) -> None:
    """Rows of each flavor and precision: parity of all first, then the checks of some."""
    with contextlib.ExitStack() as stack:
        if context.rehearse:
            from tests.gpu.proof.rehearsal import driver_double, engines_on_onnxruntime

            stack.enter_context(driver_double(context.work))
            stack.enter_context(engines_on_onnxruntime(artefacts.onnx_file(context)))
        for flavor in FLAVORS[: 1 if context.rehearse else None]:
            of_flavor(flavor, context, recorder)


def of_flavor(flavor: trt.Flavor, context: Context, recorder: Recorder) -> None:
    """All rows of one flavor; one row "missing" for each precision where it is not installed."""
    precisions = ("fp32", "tf32") if context.rehearse else artefacts.PRECISIONS
    plans: dict[str, Path] = {}
    for precision in precisions:
        with recorder.check("built", flavor=flavor, precision=precision) as figures:
            recorder.need(3)
            trt.api(flavor)
            artefacts.require_capability(precision, cuda.device_info().compute_capability)
            plan, figures["detail"] = artefacts.engine(context, flavor, precision)
            plans[precision] = plan
            figures["convolutions"] = _convolutions(plan)
            figures["detail"] += f", {figures['convolutions']}"
    for precision, plan in plans.items():
        about = {"flavor": flavor, "precision": precision}
        with recorder.check("validity", measured=True, **about) as figures:
            figures["detail"] = validity(flavor, plan)
        with recorder.check("parity with live on the CPU", **about) as figures:
            recorder.need(3)
            figures["detail"] = parity(context, plan, "cpu", figures)
        with recorder.check("parity with live on the card", **about) as figures:
            recorder.need(3)
            figures["detail"] = parity(context, plan, context.device, figures)
    for precision, plan in plans.items():
        if precision in WHOLE:
            turns = 20 if context.rehearse else 1000
            check_engine(plan, recorder, "engine", turns=turns, flavor=flavor, precision=precision)


def _convolutions(plan: Path) -> str:
    build = read_manifest(plan).build
    found = build.layers.convolution_precisions if build else {}
    return ", ".join(f"{count} {kind}" for kind, count in found.items()) + " convolutions"


def validity(flavor: trt.Flavor, plan: Path) -> str:
    """What TensorRT-RTX says of the engine on this card."""
    api = trt.api(flavor)
    runtime = api.Runtime(trt.Log(api).logger)
    if not hasattr(runtime, "get_engine_validity"):
        return "this TensorRT has no such question"
    found: Any = runtime.get_engine_validity(plan.read_bytes())
    state, reasons = found if isinstance(found, tuple) else (found, 0)
    return f"{getattr(state, 'name', state)}, reasons {reasons!r}"


def parity(context: Context, plan: Path, reference_device: str, figures: dict[str, Any]) -> str:
    """The project's own comparison, on noise and held-out digits at every corner of the profiles."""
    options = ParityOptions(
        device="cuda:0",
        reference_device=reference_device,
        samples=4 if context.rehearse else 64,
        yardstick=reference_device == "cpu" and not context.rehearse,
    )
    return judged(compare_artefacts(artefacts.checkpoint(context), [plan], options), figures)


def judged(report: ParityReport, figures: dict[str, Any]) -> str:
    """The comparison with one candidate as figures and in words. Raises AssertionError where it failed."""
    (candidate,) = report.candidates
    outputs = [output for hop in candidate.verdict.hops for output in hop.outputs]
    worst = max(output.rel_rms or 0.0 for output in outputs)
    limit = candidate.tolerance
    figures |= {"rel_rms": worst, "tolerance": limit.rel_rms, "comparisons": len(outputs), "engine": candidate.engine}
    require(report.passed, "; ".join(candidate.failures()[:3]))
    return f"RMS {worst:.1e} of {limit.rel_rms:.0e} ({limit.precision}) in {len(outputs)} comparisons"
