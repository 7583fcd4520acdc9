"""How accurate is an artefact? Scores with 95 % intervals."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.evaluate.score import ArtefactScore as ArtefactScore
    from runtime.evaluate.score import EvaluateOptions as EvaluateOptions
    from runtime.evaluate.score import Evaluation as Evaluation
    from runtime.evaluate.score import evaluate as evaluate

__all__ = ["ArtefactScore", "EvaluateOptions", "Evaluation", "evaluate"]
_HOME = {"ArtefactScore": "score", "EvaluateOptions": "score", "Evaluation": "score", "evaluate": "score"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
