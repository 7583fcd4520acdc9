"""What the builder's process said, as this project's errors: one sentence, TensorRT's own words below it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from export.tensorrt.process import BuilderFailedError
from gmconv.errors import QUOTED, BuildError, RefusedError, UnavailableError

_ORIGINAL_LINES = 12
# What TensorRT says when it gives up, and what helps.
_KNOWN = (
    (
        ("insufficient workspace", "workspace", "could not find any implementation", "no implementation"),
        "no kernel fits the workspace, or none exists for these shapes and types; raise --workspace or lower --max",
    ),
    (("out of memory", "outofmemory", "bad_alloc", "cudaerrormemory"), "memory ran out; lower --max or --workspace"),
    (
        ("compute capability", "turing", "unsupported sm"),
        "this GPU generation is not supported for that; change --compute-capability",
    ),
)
_ERRORS = {kind.exit_code: kind for kind in (RefusedError, BuildError, UnavailableError)}


def rephrase(
    failure: BuilderFailedError, path: Path, where: Callable[[str], str], title: str
) -> RefusedError | BuildError | UnavailableError:
    """One sentence about `path` for what the builder said, its own words below; `where` names a node's module."""
    sentence = f"{path}: {_sentence(failure, where, title)}"
    original = [line for text in failure.log for line in text.splitlines() if line.strip()][:_ORIGINAL_LINES]
    below = [f"{title} said:", *(line.rstrip() for line in original)] if original else []
    return _ERRORS.get(failure.exit_code, BuildError)(QUOTED.join([sentence, *below]))


def _sentence(failure: BuilderFailedError, where: Callable[[str], str], title: str) -> str:
    if failure.nodes:
        listed = "; ".join(
            f"{where(n['node']) if n['node'] else 'the model'}{', a ' + n['op'] if n['op'] else ''}"
            for n in failure.nodes
        )
        return f"{title} has no implementation for {listed}: replace it in the model, or use ONNX Runtime"
    said = " ".join(failure.log).lower()
    for words, advice in _KNOWN:
        if any(word in said for word in words):
            return f"{failure.message}: {advice}"
    return failure.message
