"""Running what somebody compiled as it was written: compiled code shows nothing, and rounds in another way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_written() -> Iterator[None]:
    """Functions and modules that went through torch.compile, and branches of torch.cond, run in eager mode."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
