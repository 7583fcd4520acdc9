"""Options that name a file to write: none may be one that the command reads, or that it writes by another option."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from gmconv.errors import RefusedError
from gmconv.files import refuse_inputs
from gmconv.kinds import ARTEFACT_SUFFIXES


class Written(click.Path):
    """A file that a command writes, as a `Path`; `aside`: not its result, so its name may not be one of an artefact,
    of data or of code. `ending`: the one that its name must have.
    """

    def __init__(self, ending: str = "", *, aside: bool = False) -> None:
        super().__init__(path_type=Path)
        self.ending, self.aside = ending, aside

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As click.Path does it."""
        path = Path(str(super().convert(value, param, ctx)))
        if self.ending and path.suffix.lower() != self.ending:
            self.fail(f"{path}: what is written there has a name that ends in {self.ending}", param, ctx)
        if self.aside and path.suffix.lower() in {*ARTEFACT_SUFFIXES, ".npz", ".py"}:
            self.fail(f"{path}: what is written there is no {path.suffix} file; give a name that says so", param, ctx)
        return path


def refuse_clashes(ctx: click.Context) -> None:
    """Before a command begins: its outputs are no inputs, no manifests of inputs, and each is another file.

    Raises RefusedError, click.UsageError.
    """
    outputs: dict[str, Path] = {}
    inputs: set[Path] = set()
    for parameter in ctx.command.params:
        value = ctx.params.get(str(parameter.name))
        if not isinstance(parameter.type, Written):
            inputs |= set(_files(value))
        elif value is not None:
            outputs[parameter.opts[-1]] = value
    for path in outputs.values():
        refuse_inputs(path, *inputs)
        for file in sorted(inputs):
            if path.resolve() == _manifest(file):
                raise RefusedError(f"{path}: is the manifest of {file}, which it would overwrite; give another name")
    for (one, path), (other, second) in combinations(outputs.items(), 2):
        if {path.resolve(), _manifest(path)} & {second.resolve(), _manifest(second)}:
            raise click.UsageError(f"{one} and {other} would both write {second}; give two names", ctx)


def _manifest(artefact: Path) -> Path:
    return Path(f"{artefact}.json").resolve()


def _files(value: Any) -> Iterator[Path]:
    """The files that a value names, also as FILE@option=value."""
    if isinstance(value, str | Path):
        for text in {str(value), str(value).rpartition("@")[0]}:
            with suppress(OSError, ValueError):  # no name of a file at all
                yield from [Path(text)] if Path(text).is_file() else []
    elif isinstance(value, Mapping):
        yield from (file for each in value.values() for file in _files(each))
    elif isinstance(value, tuple | list):
        yield from (file for each in value for file in _files(each))
