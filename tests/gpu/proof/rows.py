"""What a step leaves behind: one JSON line per check, appended and flushed the moment it is known."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "measured", "missing", "not run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One check of one step. `flavor` and `precision` are empty where the check is about neither."""

    step: str
    what: str
    status: Status
    detail: str = ""
    flavor: str = ""
    precision: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class NotRunError(Exception):
    """A check that was not made, and why."""


def say(error: BaseException) -> str:
    """An exception in one line, with the line of code that raised it unless it is one of our own sentences."""
    text = " ".join((getattr(error, "message", "") or str(error) or type(error).__name__).split())[:400]
    if hasattr(error, "exit_code"):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(frame[0].filename).name}:{frame[0].lineno})" if frame else ""
    return f"{type(error).__name__}: {text}{where}"


@dataclass(slots=True)
class Recorder:
    """Writes one step's rows. `deadline` is a `time.monotonic` moment: checks that start after it are not run."""

    path: Path
    step: str
    deadline: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float) -> None:
        """Inside a check, before it begins. Raises NotRunError where fewer seconds are left than it takes."""
        if self.left < seconds:
            raise NotRunError(f"{max(0.0, self.left):.0f} s were left, it needs about {seconds:.0f}")

    def add(self, what: str, status: Status, detail: str = "", **more: Any) -> None:
        """Append one row; more: flavor, precision, figures, seconds."""
        append(self.path, Row(step=self.step, what=what, status=status, detail=detail, **more))

    @contextlib.contextmanager
    def check(
        self, what: str, *, flavor: str = "", precision: str = "", measured: bool = False
    ) -> Iterator[dict[str, Any]]:
        """One check: fill the dict it yields with figures ("detail" becomes the row's words); an exception fails it.

        What the machine lacks is a row "missing".
        """
        figures: dict[str, Any] = {}
        began = time.monotonic()
        status: Status = "measured" if measured else "passed"
        words = ""
        try:
            yield figures
        except NotRunError as error:
            status, words = "not run", str(error)
        except ImportError as error:
            status, words = "missing", str(error)
        except Exception as error:
            lacking = getattr(error, "exit_code", None) == 6
            status, words = "missing" if lacking else "failed", say(error)
            if not lacking:
                traceback.print_exc()
        detail = words or str(figures.pop("detail", ""))
        figures.pop("detail", None)
        spent = round(time.monotonic() - began, 2)
        self.add(what, status, detail, flavor=flavor, precision=precision, figures=figures, seconds=spent)


def append(path: Path, row: Row) -> None:
    """Add a line that is on the disk when this returns."""
    line = json.dumps(asdict(row), default=str) + "\n"
    with path.open("a") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[Row]:
    """The rows in a file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(Row(**json.loads(line)))
    return rows


def require(condition: object, sentence: str) -> None:
    """Raise AssertionError with `sentence` unless `condition`; `assert` would vanish under -O."""
    if not condition:
        raise AssertionError(sentence)


StepFunction = Callable[..., None]
