"""A precision plan: which layers stay above int8 or fp8. The file that reproduces an --auto-precision choice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from gmconv.errors import RefusedError
from gmconv.files import write_text
from runtime.manifest import PLAN_SCHEMA
from runtime.records import Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionPlan:
    """`keep`: layer name -> the type it keeps. `measured` and `budget` say what the choice rested on."""

    precision: Literal["int8", "fp8"]
    keep: dict[str, Literal["fp16", "fp32"]]
    schema: str = PLAN_SCHEMA
    target: Literal["tensorrt", "cpu"] = "tensorrt"
    source_sha256: str = ""
    budget: dict[str, float | str] = field(default_factory=dict)
    calibration: Calibration | None = None
    measured: list[dict[str, Any]] = field(default_factory=list)

    def refuse_other_calibration(self, used: Calibration | None) -> None:
        """Raise RefusedError when `used` (a manifest's calibration) rests on other images than the plan did."""
        planned = self.calibration.sha256 if self.calibration else None
        if planned and used and used.sha256 and used.sha256 != planned:
            raise RefusedError(
                f"the plan was made with other calibration images ({planned[:12]}…, these are {used.sha256[:12]}…); "
                "give the same --calibration, or make a new plan"
            )

    def refuse_unless_fits(self, layers: Collection[str], precision: str) -> None:
        """Raise RefusedError when the plan is for another precision or names layers that this network has not."""
        if precision != self.precision:
            raise RefusedError(f"the plan is for {self.precision}, not for {precision}")
        unknown = sorted(set(self.keep) - set(layers))
        if unknown:
            raise RefusedError(f"the plan keeps {', '.join(unknown[:3])}, which this network has not; make a new plan")


def read_plan(path: Path) -> PrecisionPlan:
    """The plan at `path`. Raises RefusedError when it is missing or no plan of this schema."""
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=PrecisionPlan)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: not a precision plan ({error})") from error
    if plan.schema != PLAN_SCHEMA:
        raise RefusedError(f"{path}: schema {plan.schema[:80]!r}, this version reads {PLAN_SCHEMA!r}")
    return plan


def write_plan(path: Path, plan: PrecisionPlan) -> None:
    """Write `plan` as JSON, whole or not at all."""
    text = msgspec.json.format(msgspec.json.encode(plan), indent=1) + b"\n"
    write_text(path, text.decode())
