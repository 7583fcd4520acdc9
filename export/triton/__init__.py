"""An artefact as one version of a model in a Triton repository."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.triton.config import ServingOptions as ServingOptions
    from export.triton.config import check_config as check_config
    from export.triton.config import model_config as model_config
    from export.triton.config import to_text as to_text
    from export.triton.interface import Interface as Interface
    from export.triton.write import RepositoryEntry as RepositoryEntry
    from export.triton.write import write_repository as write_repository

__all__ = [
    "Interface",
    "RepositoryEntry",
    "ServingOptions",
    "check_config",
    "model_config",
    "to_text",
    "write_repository",
]
_HOME = {
    "Interface": "interface",
    "RepositoryEntry": "write",
    "ServingOptions": "config",
    "check_config": "config",
    "model_config": "config",
    "to_text": "config",
    "write_repository": "write",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
