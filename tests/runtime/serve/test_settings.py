"""What a server's settings resolve to."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.serve import settings as module
from runtime.serve.models import open_runners
from runtime.serve.settings import Settings

from .conftest import classifier


@pytest.mark.parametrize(
    ("given", "threads", "solo"),
    [
        ({}, 8, 0),
        ({"instances": 4}, 2, 8),
        ({"instances": 8, "threads": 4}, 4, 8),
        ({"instances": 2, "threads": 1}, 1, 2),
        ({"instances": 2, "solo_threads": 0}, 4, 0),
        ({"solo_threads": 3}, 8, 3),
        ({"instances": 100}, 1, 8),
    ],
)
def test_threads_share_the_cores_and_a_lone_request_gets_them_all(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, int], threads: int, solo: int
) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    settings = Settings(source=Path(), **given)  # type: ignore[arg-type]
    assert (settings.intra_op_threads, settings.solo_intra_op_threads) == (threads, solo)


@pytest.mark.parametrize(("solo_threads", "extra"), [(0, False), (2, True)])
def test_one_engine_per_instance_and_one_for_a_lone_request(tmp_path: Path, solo_threads: int, extra: bool) -> None:
    path = classifier(tmp_path / "m.onnx")
    runners, solo = open_runners(path, Settings(source=path, instances=2, threads=1, solo_threads=solo_threads))
    assert len(runners) == 2
    assert (solo is not None) is extra
    for runner in [*runners, *([solo] if solo else [])]:
        runner.close()
