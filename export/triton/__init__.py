"""An artefact as one version of a model in a Triton repository."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from export.triton.config import ServingOptions as ServingOptions
    from export.triton.config import check_config as check_config
    from export.triton.config import model_config as model_config
    from export.triton.config import to_text as to_text
    from export.triton.interface import Interface as Interface
    from export.triton.write import RepositoryEntry as RepositoryEntry
    from export.triton.write import write_repository as write_repository

__getattr__, __dir__ = attach(
    __name__,
    {
        "Interface": ".interface",
        "RepositoryEntry": ".write",
        "ServingOptions": ".config",
        "check_config": ".config",
        "model_config": ".config",
        "to_text": ".config",
        "write_repository": ".write",
    },
)
__all__ = __dir__()
