"""The inference server: Open Inference Protocol over REST and gRPC, dynamic batching.

`serve("net.onnx", http_port=8000)` serves until SIGTERM, as `python -m runtime.serve` does; `Settings` has the choices.
"""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.serve.server import serve as serve
    from runtime.serve.settings import Settings as Settings

__getattr__, __dir__ = attach(__name__, {"Settings": ".settings", "serve": ".server"})
__all__ = __dir__()
