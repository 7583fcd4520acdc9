"""Per-layer times, always from a run of its own: a profiler slows what it watches (trtexec 11 does the same)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmconv.errors import RefusedError
from runtime.artefact import artefact_kind
from runtime.runners import open_runner
from runtime.runners.base import Array, LayerTime, Runner

_WARM_UP = 5
_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh")


def layer_times(
    path: Path, runner: Runner, feeds: Mapping[str, Array], runs: int, device: str, options: Mapping[str, Any]
) -> list[LayerTime] | None:
    """Times of each layer of the built graph over `runs` runs; None where the engine has no profiler here.

    An ONNX file is opened a second time, with the same options and ONNX Runtime's own profiler.
    """
    if artefact_kind(path) != "onnx":
        return runner.layer_times(feeds, runs)
    found = parse_ort_profile(_ort_profile(path, feeds, runs, device, options), runs)
    names = layer_names(path)
    return [LayerTime(_in_users_words(layer.name, names), layer.times) for layer in found]


def layer_info(
    path: Path, runner: Runner, feeds: Mapping[str, Array], device: str, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The layers as built, `{"Layers": [...]}`; for an ONNX file, the nodes that ONNX Runtime was left with."""
    if artefact_kind(path) != "onnx":
        return runner.layer_info()
    layers = {}
    names = layer_names(path)
    for event in _node_events(_ort_profile(path, feeds, 1, device, options)):
        found = event.get("args", {})
        layers[_node_name(event)] = {
            "Name": _in_users_words(_node_name(event), names),
            "LayerType": found.get("op_name", ""),
            "Provider": found.get("provider", ""),
            "Inputs": found.get("input_type_shape", []),
            "Outputs": found.get("output_type_shape", []),
        }
    return {"Layers": list(layers.values())}


def layer_names(path: Path) -> dict[str, str]:
    """The module of the trained network behind a node, by the node's name and by its output's name.

    The exporter names a weight after its module; an activation that ONNX Runtime fuses into a convolution is of the
    convolution's module. Empty where onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        return {}
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    names: dict[str, str] = {}
    for node in graph.node:
        own = [i.removesuffix(".weight") for i in node.input if i in weights and i.endswith(".weight")]
        if not own and node.op_type in _FUSED and node.input[0] in names:
            own = [names[node.input[0]]]
        if own:
            names.update(dict.fromkeys((node.name, *node.output), own[0]))
    return names


def _in_users_words(name: str, names: Mapping[str, str]) -> str:
    stem = name.removesuffix("_nchwc")
    layer = names.get(stem) or names.get(f"node_{stem}")
    return f"{layer} ({name})" if layer and layer != name else name


def _ort_profile(path: Path, feeds: Mapping[str, Array], runs: int, device: str, options: Mapping[str, Any]) -> str:
    """The text of ONNX Runtime's profile of `runs` runs and a few before them."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        with open_runner(path, device=device, profile=prefix, **options) as profiled:
            call = profiled.bind(feeds)
            for _ in range(runs + _WARM_UP):
                call()
            profiled.end_profiling()  # type: ignore[attr-defined]
        files = list(Path(folder).glob("profile*.json"))
        if not files:
            raise RefusedError(f"{path}: ONNX Runtime wrote no profile")
        return files[0].read_text()


def parse_ort_profile(text: str, runs: int) -> list[LayerTime]:
    """The last `runs` runs of an ONNX Runtime profile as one `LayerTime` per node, in order of execution."""
    times: dict[str, list[float]] = {}
    for event in _node_events(text):
        times.setdefault(_node_name(event), []).append(event["dur"] / 1000)
    return [LayerTime(name, tuple(values[-runs:])) for name, values in times.items()]


def model_run_times(text: str) -> list[float]:
    """Duration (ms) of every whole run in an ONNX Runtime profile."""
    return [event["dur"] / 1000 for event in json.loads(text) if event.get("name") == "model_run"]


def _node_events(text: str) -> list[dict[str, Any]]:
    return [e for e in json.loads(text) if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")]


def _node_name(event: Mapping[str, Any]) -> str:
    return str(event["name"]).removesuffix("_kernel_time")
