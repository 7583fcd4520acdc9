"""`gmconv.lookups`: inputs that choose rows of a table are followed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional

from gmconv.inputs import Input
from gmconv.lookups import table_ends

KIND = Input("kind", (1,), "int64")


class Net(nn.Module):
    """A table of ten rows, and what a forward does with it."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.short, self.act = nn.Embedding(10, 3), nn.Embedding(4, 3), forward

    def forward(self, kind: Tensor) -> Tensor:
        return self.act(self, kind)


@pytest.mark.parametrize(
    ("forward", "last"),
    [
        (lambda net, kind: net.table(kind.squeeze(1)), 9),
        (lambda net, kind: net.table(kind[:, 0].int()), 9),
        (lambda net, kind: net.table.weight[kind.view(-1)], 9),
        (lambda net, kind: net.table.weight.index_select(0, kind.flatten()), 9),
        (lambda net, kind: functional.embedding_bag(kind, net.table.weight), 9),
        (lambda net, kind: functional.one_hot(kind, 7).float(), 6),
        (lambda net, kind: net.table(kind) + net.short(kind), 3),
        (lambda net, kind: net.table((kind + 3) % 10), None),  # any number will do
        (lambda net, kind: kind * 2.0, None),
    ],
)
def test_the_rows_are_those_of_the_shortest_table(forward: Callable[[Any, Tensor], Tensor], last: int | None) -> None:
    assert table_ends(Net(forward), (KIND,)) == ({} if last is None else {"kind": (0, last)})


def test_a_network_without_whole_numbers_is_not_run() -> None:
    def refuse(net: Any, kind: Tensor) -> Tensor:
        raise AssertionError

    assert table_ends(Net(refuse), (Input("image", (3, 8, 8)),)) == {}
    assert table_ends(Net(refuse), (KIND,)) == {}
