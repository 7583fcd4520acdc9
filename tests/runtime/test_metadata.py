"""Preprocessing and labels that a graph contradicts are refused before anybody serves by them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from runtime.manifest import FileDigest, Manifest, TensorSpec
from runtime.metadata import refuse_untrue

TRUE = Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
MANIFEST = Manifest(
    artefact=FileDigest("onnx", "net.onnx", "0" * 64, 1),
    inputs=(TensorSpec("input", "float32", ("batch", 3, 8, 8)),),
    outputs=(TensorSpec("logits", "float32", ("batch", 5)),),
    preprocessing=TRUE,
    labels=tuple("abcde"),
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"preprocessing": replace(TRUE, size=(8, 9))}, "makes 8x9 pixels, and the network takes 8x8"),
        ({"preprocessing": replace(TRUE, std=(0.2, 0.0, 0.2))}, "a deviation of 0"),
        ({"preprocessing": replace(TRUE, std=(0.2, float("nan"), 0.2))}, "not finite"),
        ({"preprocessing": replace(TRUE, mean=(0.5,), std=(0.2,))}, "1 means and 1 deviations for 3 channels"),
        ({"preprocessing": replace(TRUE, channel_order="L", mean=(0.5,), std=(0.2,))}, "the network takes 3"),
        ({"labels": ("a", "b")}, "2 labels for 5 classes"),
    ],
)
def test_what_the_graph_contradicts_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(RefusedError, match=rf"net\.onnx: .*{words}"):
        refuse_untrue(replace(MANIFEST, **change))


def test_what_fits_or_is_not_said_passes() -> None:
    refuse_untrue(MANIFEST)
    refuse_untrue(replace(MANIFEST, preprocessing=None, labels=None))
    free = (TensorSpec("input", "float32", ("batch", 3, "height", "width")),)
    refuse_untrue(replace(MANIFEST, inputs=free))
    refuse_untrue(replace(MANIFEST, outputs=(TensorSpec("map", "float32", ("batch", 7, 8, 8)),)))
