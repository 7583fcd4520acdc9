"""Per-layer times and descriptions of a checkpoint, which the benchmark's --dumpProfile and --dumpLayerInfo print."""

from pathlib import Path

import numpy as np
import pytest

from runtime.runners import open_runner


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gmconv

    path = tmp_path_factory.mktemp("layers") / "net.pt"
    model = gmconv.models.create("resnet20", num_classes=10)
    gmconv.save_checkpoint(
        path, model, arch="gmconv.models:resnet20", input_shape=(3, 8, 8), arch_kwargs={"num_classes": 10}
    )
    return path


@pytest.mark.parametrize("form", ["live", "baked"])
def test_every_layer_has_a_time_per_run_and_the_hooks_are_gone(checkpoint: Path, form: str) -> None:
    feeds = {"input": np.zeros((2, 3, 8, 8), np.float32)}
    with open_runner(checkpoint, form=form) as runner:
        layers = runner.layer_times(feeds, 4)
        assert layers is not None
        assert {"conv1", "layer3.2.conv2"} <= {layer.name for layer in layers}
        assert all(len(layer.times) == 4 and min(layer.times) > 0 for layer in layers)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in runner.model.modules())  # type: ignore[attr-defined]
        info = runner.layer_info()
        assert info is not None
        kind = {layer["Name"]: layer["LayerType"] for layer in info["Layers"]}["conv1"]
        assert kind == ("GMConv2d" if form == "live" else "Conv2d")
