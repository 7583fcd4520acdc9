"""Run an artefact, compare it, time it, serve it. Imports no torch outside `runtime.runners.torch`.

`serve` is a package: `runtime.serve.serve("net.onnx", http_port=8000)` serves, as `python -m runtime.serve` does.
"""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.artefact import open_artefact as open_artefact
    from runtime.benchmark.comparison import time_artefacts as time_artefacts
    from runtime.evaluate.score import EvaluateOptions as EvaluateOptions
    from runtime.evaluate.score import score_artefacts as score_artefacts
    from runtime.parity.run import ParityOptions as ParityOptions
    from runtime.parity.run import compare_artefacts as compare_artefacts
    from runtime.runners import open_runner as open_runner

__getattr__, __dir__ = attach(
    __name__,
    {
        "EvaluateOptions": ".evaluate.score",
        "ParityOptions": ".parity.run",
        "compare_artefacts": ".parity.run",
        "open_artefact": ".artefact",
        "open_runner": ".runners",
        "score_artefacts": ".evaluate.score",
        "serve": ".serve:",
        "time_artefacts": ".benchmark.comparison",
    },
)
__all__ = __dir__()
