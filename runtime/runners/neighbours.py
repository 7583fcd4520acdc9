"""What the other files of one command say of a checkpoint that does not say what its network takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from gmconv.errors import RefusedError, UnavailableError
from gmconv.foreign import Foreign
from runtime.artefact import Facts, artefact_kind, facts_of, usual_inputs
from runtime.manifest import read_manifest, sidecar
from runtime.runners import open_runner


def with_neighbours(foreign: Foreign, paths: Iterable[Path]) -> Foreign:
    """`foreign` with `paths` beside it, and the inputs of the first ONNX file or engine of them, unless it says them.

    Of an engine without a manifest nothing is known before it runs.
    """
    paths = list(paths)
    foreign = replace(foreign, beside=tuple(paths))
    if foreign.inputs or foreign.input_shape:
        return foreign
    kinds = [artefact_kind(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        with contextlib.suppress(RefusedError, UnavailableError):  # told to whoever opens it
            found = None
            if sidecar(path).exists():
                manifest = read_manifest(path, verify=False)
                found = usual_inputs(manifest.inputs, facts_of(manifest))
            elif kind == "onnx" and "checkpoint" in kinds:
                with open_runner(path) as runner:
                    found = usual_inputs(runner.inputs, Facts())
            if found:
                return replace(foreign, usual_inputs=found)
    return foreign
