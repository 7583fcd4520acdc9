"""What a training run would destroy: files of others, networks of other runs, and runs that may still go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmconv.checkpoint.file import read_file
from gmconv.checkpoint.load import SCHEMA
from gmconv.errors import CheckpointError, RefusedError, printable
from gmconv.train.options import TrainOptions, qualified, state_path
from gmconv.train.resume import read_state


def refuse_replacing(output: Path, options: TrainOptions, *, named: bool, resumed: bool = False) -> None:
    """Refuse to write over what no run of `options` wrote, before there is anything to lose.

    An `output` that is there must be a checkpoint of `gmconv train`; unless it was `named`, one of the same
    architecture and data, as the name of both tells. A run that was stopped is `resumed`, or not begun again.

    Raises:
        RefusedError: says what is there.
    """
    advice = f"give {'another' if named else 'a'} name with -o, or --force to replace it"
    if output.exists():
        found = _trained(output)
        if found is None and resumed:
            raise RefusedError(
                f"{output}: is no checkpoint that gmconv train wrote, and the best epoch of the run belongs there; put "
                f"it back, or train anew"
            )
        if found is None:
            raise RefusedError(f"{output}: is there, and is no checkpoint that gmconv train wrote: {advice}")
        mine = (qualified(options.arch), Path(options.dataset).name)
        if not named and found != mine:
            there, here = (" trained on ".join(printable(word) for word in each) for each in (found, mine))
            raise RefusedError(f"{output}: is {there}, and this would be {here}: {advice}")
    state = state_path(output)
    if resumed or not state.exists():
        return
    try:
        done = len(read_state(state).history)
    except CheckpointError as error:
        raise RefusedError(
            f"{state}: is where a run keeps its state, and is there, and is none: give another name with -o, or "
            f"--force to replace it"
        ) from error
    raise RefusedError(
        f"{state}: a run that was stopped after epoch {done} is there: go on with --resume {state}, or give --force to "
        f"begin again"
    )


def _trained(output: Path) -> tuple[str, str] | None:
    """Architecture and data of a checkpoint that `gmconv train` wrote; None for any other file."""
    try:
        found = read_file(output)
    except CheckpointError:
        return None
    training: Any = found.get("training")
    if (
        found.get("schema") != SCHEMA
        or not isinstance(training, dict)
        or not {"options", "best_epoch"} <= set(training)
    ):
        return None
    return str(found.get("arch")), str(training.get("dataset"))
