"""How images are prepared, as checkpoints and manifests record it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing, differences, read_preprocessing

RGB = Preprocessing(size=(8, 12), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
GREY = Preprocessing(size=(8, 8), mean=(0.0,), std=(1.0,), channel_order="L")


def test_what_differs_is_said_field_by_field() -> None:
    own = replace(RGB, mean=(0.5, 0.4, 0.3), size=(8, 16), resize="shortest-then-crop", crop_ratio=0.875)
    said = "size 8, 16 (not 8, 12), mean 0.5, 0.4, 0.3 (not 0, 0, 0), resize shortest-then-crop (not stretch)"
    assert differences(own, RGB) == f"{said}, crop_ratio 0.875 (not 1)"
    assert differences(GREY, RGB).startswith("size 8, 8 (not 8, 12), mean 0 (not 0, 0, 0)")
    near = replace(own, mean=tuple(float(np.float32(one)) for one in own.mean))
    assert not differences(near, own), "float32 on its way"
    assert not differences(replace(RGB, crop_ratio=0.5), RGB), "what stretches does not crop"


def test_what_a_checkpoint_says_is_read_or_refused() -> None:
    fields = {"size": [8, 12], "mean": [0, 0, 0], "std": [1, 1, 1]}
    assert read_preprocessing(fields) == RGB
    assert read_preprocessing(None) is None
    with pytest.raises(RefusedError, match="preprocessing is damaged .*size"):
        read_preprocessing({**fields, "size": "large"})


def test_it_is_read_without_numpy() -> None:
    code = "import sys, runtime.artefact; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "every command reads manifests"
