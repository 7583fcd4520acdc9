"""After the build, where there is a GPU: parity at every profile corner and a short benchmark, into the manifest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec

from gmconv.errors import ArchitectureUnavailableError, CheckpointError, ParityError, UnavailableError
from gmconv.foreign import NOTHING, Foreign
from runtime import cuda, trt
from runtime.artefact import Artefact
from runtime.manifest import Manifest
from runtime.records import Benchmark, Parity

DEVICE = "cuda:0"
# Short: a build is not the place to measure; enough to see an engine that is ten times too slow.
WARM_UP_MS, DURATION_S, ITERATIONS = 200.0, 1.0, 10


def verify_engine(
    onnx_path: Path,
    plan: Path,
    manifest: Manifest,
    checkpoint: Path | None,
    foreign: Foreign = NOTHING,
    golden: Path | None = None,
) -> Manifest:
    """The manifest with the results of `plan` against its source: the live checkpoint if found, else the ONNX file.

    An engine that cannot run here, or of which TensorRT-RTX says so, is a good engine all the same: that is recorded.

    Raises ParityError when an output is out of tolerance.
    """
    reason = why_not(manifest)
    if reason:
        return dataclasses.replace(manifest, parity=Parity(result="not run", reason=reason))
    trained = Artefact(path=onnx_path, kind="onnx", manifest=manifest).checkpoint(checkpoint)
    try:
        try:
            parity = check_parity(trained or onnx_path, plan, foreign, golden)
        except (CheckpointError, ArchitectureUnavailableError):
            if trained is None or checkpoint is not None:
                raise
            # Nobody asked for the one beside it, which says too little.
            parity = check_parity(onnx_path, plan, golden=golden)
        manifest = dataclasses.replace(manifest, parity=parity)
        return dataclasses.replace(manifest, benchmark=time_engine(plan))
    except UnavailableError as error:
        reason = error.message.removeprefix(f"{plan}: ")
        if manifest.parity is not None and manifest.parity.result == "passed":
            missing = Benchmark(artefact=plan.name, result="not run", reason=reason)
            return dataclasses.replace(manifest, benchmark=missing)
        return dataclasses.replace(manifest, parity=Parity(result="not run", reason=reason))


def why_not(manifest: Manifest) -> str | None:
    """Why this engine cannot be verified on this GPU, or None."""
    if manifest.build and manifest.build.strip:
        return "weights stripped"
    return trt.gpu_fits(manifest, cuda.device_info().compute_capability)


def check_parity(reference: Path, plan: Path, foreign: Foreign = NOTHING, golden: Path | None = None) -> Parity:
    """Compare at every corner of the profiles. Raises ParityError with the first failure."""
    from runtime.parity.run import ParityOptions, compare_artefacts

    report = compare_artefacts(reference, [plan], ParityOptions(device=DEVICE, foreign=foreign, golden=golden))
    candidate = report.candidates[0]
    if not report.passed:
        raise ParityError(f"{plan.name}: differs from {reference.name}: {candidate.verdict.summary()}")
    return candidate.record(reference)


def time_engine(plan: Path) -> Benchmark:
    """A short benchmark with trtexec's defaults: no transfers, CUDA graphs."""
    from runtime.benchmark.measure import Artefact, Prepared, measure
    from runtime.benchmark.options import Options
    from runtime.benchmark.timing import LoopOptions

    loop = LoopOptions(warm_up=WARM_UP_MS, duration=DURATION_S, iterations=ITERATIONS)
    options = Options(loop=loop, device=DEVICE)
    with Prepared(Artefact(plan), options) as prepared:
        measured = measure(prepared, options)
        return msgspec.convert(plain(measured.to_dict(options.percentiles)), Benchmark)


def plain(value: dict[str, Any]) -> dict[str, Any]:
    """`value` as JSON has it: no NaN or infinity (an exact output's SNR), null instead."""
    found: dict[str, Any] = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
    return found
