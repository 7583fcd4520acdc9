"""What the metrics say of engines."""

from __future__ import annotations

from types import SimpleNamespace

from runtime.records import Build
from runtime.serve.observe.metrics import build_times


def test_only_engines_have_a_build_time() -> None:
    built = SimpleNamespace(build=Build(flavor="rtx", seconds={"parse": 0.1, "build": 2.5}))
    manifests = {"engine": built, "onnx": SimpleNamespace(build=None), "foreign": None}
    models = [(SimpleNamespace(manifest=manifest), {"model": name}) for name, manifest in manifests.items()]
    (sample,) = build_times(models).samples
    assert (sample.name, sample.labels, sample.value) == ("gmconv_engine_build_seconds", {"model": "engine"}, 2.5)
