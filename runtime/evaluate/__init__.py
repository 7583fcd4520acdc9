"""How accurate is an artefact? Scores with 95 % intervals."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.evaluate.report import ArtefactScore as ArtefactScore
    from runtime.evaluate.report import Evaluation as Evaluation
    from runtime.evaluate.score import EvaluateOptions as EvaluateOptions
    from runtime.evaluate.score import evaluate as evaluate

__getattr__, __dir__ = attach(
    __name__,
    {
        "ArtefactScore": ".report",
        "EvaluateOptions": ".score",
        "Evaluation": ".report",
        "evaluate": ".score",
    },
)
__all__ = __dir__()
