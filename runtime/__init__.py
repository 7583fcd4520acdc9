"""Run an artefact, compare it, time it, serve it. Imports no torch outside `runtime.runners.torch`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.artefact import open_artefact as open_artefact
    from runtime.benchmark.comparison import time_artefacts as time_artefacts
    from runtime.evaluate.score import EvaluateOptions as EvaluateOptions
    from runtime.evaluate.score import evaluate as score_artefacts
    from runtime.parity.run import ParityOptions as ParityOptions
    from runtime.parity.run import compare_artefacts as compare_artefacts
    from runtime.runners import open_runner as open_runner

#: Each public name and where it lives; imported when first used.
_HOME = {
    "EvaluateOptions": "runtime.evaluate.score",
    "ParityOptions": "runtime.parity.run",
    "compare_artefacts": "runtime.parity.run",
    "open_artefact": "runtime.artefact",
    "open_runner": "runtime.runners",
    "score_artefacts": "runtime.evaluate.score:evaluate",
    "time_artefacts": "runtime.benchmark.comparison",
}
__all__ = [
    "EvaluateOptions",
    "ParityOptions",
    "compare_artefacts",
    "open_artefact",
    "open_runner",
    "score_artefacts",
    "time_artefacts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), own or name)


def __dir__() -> list[str]:
    return __all__
