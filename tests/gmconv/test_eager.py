"""What was compiled runs as it was written where the two are to be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gmconv.eager import as_written


def another(graph: Callable[..., Any], _: object) -> Callable[..., Any]:
    """A compiler whose code computes something else."""
    return lambda *args: [out + 1 for out in graph(*args)]


def test_compiled_functions_run_as_they_were_written() -> None:
    double = torch.compile(lambda x: x * 2, backend=another)
    x: Tensor = torch.ones(2)
    assert double(x).tolist() == [3, 3]
    with as_written():
        assert double(x).tolist() == [2, 2]
    assert double(x).tolist() == [3, 3]
