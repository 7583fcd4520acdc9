"""A Triton config.pbtxt beside a model: what is done, what is said not to be done, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gmconv.errors import RefusedError
from runtime.manifest import TensorSpec, read_manifest
from runtime.records import Export
from runtime.serve.models.config import read_config
from runtime.serve.models.source import find_sources
from runtime.serve.models.version import make_signature
from runtime.serve.settings import Settings

from ..conftest import Server, classifier

FULL = """
name: "m" backend: "onnxruntime" max_batch_size: 16
version_policy: { latest: { num_versions: 2 } }
instance_group [ { count: 2 kind: KIND_CPU } ]
dynamic_batching {
  max_queue_delay_microseconds: 500 preferred_batch_size: [ 8 ] priority_levels: 3 default_priority_level: 3
  default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 250000 timeout_action: DELAY }
}
optimization { priority: PRIORITY_MAX }
"""


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.pbtxt"
    path.write_text(text)
    return path


def test_what_is_honoured_and_what_is_said_not_to_be(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, FULL))
    settings = config.apply(Settings(source=tmp_path))
    assert config.max_batch == 16
    assert (settings.instances, settings.max_queue_delay, settings.queue_size) == (2, 0.0005, 7)
    assert (settings.queue_timeout, settings.priority_levels, settings.default_priority) == (0.25, 3, 3)
    assert not settings.timeout_override
    assert sorted(config.ignored) == [
        "default_queue_policy.timeout_action",
        "dynamic_batching.preferred_batch_size",
        "instance_group.kind",
        "optimization",
    ]


@pytest.mark.parametrize(
    ("policy", "versions"),
    [
        ("", {"10"}),
        ("version_policy: { latest: { num_versions: 2 } }", {"9", "10"}),
        ("version_policy: { all: {} }", {"1", "9", "10"}),
        ("version_policy: { specific: { versions: [ 1, 9, 11 ] } }", {"1", "9"}),
    ],
)
def test_the_version_policy_chooses(tmp_path: Path, policy: str, versions: set[str]) -> None:
    for version in ("1", "9", "10"):
        classifier(tmp_path / "m" / version / "model.onnx")
    write(tmp_path / "m", f'name: "m" max_batch_size: 8 {policy}')
    for root in (tmp_path, tmp_path / "m"):
        assert {s.version for s in find_sources(Settings(source=root))} == versions


@pytest.mark.parametrize("text", ["max_batch_size: -1", "max_batch_size: many", "no_such_field: 1", "\0"])
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(RefusedError, match="config.pbtxt"):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize(("max_batch", "elements"), [(4, 4 * 3), (0, (64 << 20) // 4)])
def test_a_model_that_is_not_batched_takes_json_of_any_number_of_rows(max_batch: int, elements: int) -> None:
    tensor = TensorSpec("x", "float32", ("batch", 3))
    runner = SimpleNamespace(inputs=(tensor,), outputs=(tensor,), profiles=())
    assert make_signature(runner, None, Settings(source=Path()), max_batch).max_elements == elements


def test_requests_whose_rows_would_meet_are_not_merged(tmp_path: Path) -> None:
    tensor = TensorSpec("x", "float32", ("batch", 3))
    runner = SimpleNamespace(inputs=(tensor,), outputs=(tensor,), profiles=())
    artefact = classifier(tmp_path / "m.onnx")
    for meet, rows in ((False, 32), (True, 0)):
        manifest = replace(
            read_manifest(artefact), preprocessing=None, labels=None, export=Export(opset=20, rows_meet=meet)
        )
        assert make_signature(runner, manifest, Settings(source=Path())).max_rows == rows


def test_a_served_model_keeps_its_own_limits(start: Callable[..., Server], tmp_path: Path) -> None:
    classifier(tmp_path / "m" / "1" / "model.onnx")
    write(tmp_path / "m", 'name: "m" max_batch_size: 3 dynamic_batching { } response_cache { enable: true }')
    server = start(tmp_path)

    def infer(rows: int) -> int:
        x = np.zeros((rows, 3, 8, 8), np.float32)
        tensor = {"name": "input", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
        return server.request("POST", "/v2/models/m/infer", json.dumps({"inputs": [tensor]}).encode())[0]

    assert [infer(rows) for rows in (1, 3, 4)] == [200, 200, 400]
    assert server.json("/v2/models/m/config")["max_batch_size"] == 3
    status, _, body = server.request("POST", "/v2/repository/index", b'{"ready": true}')
    assert status == 200
    assert json.loads(body) == [{"name": "m", "version": "1", "state": "READY", "reason": ""}]
    assert server.stop() == 0
    assert "config.pbtxt: max_batch_size 3" in server.log
    assert "not done by this server: response_cache" in server.log
