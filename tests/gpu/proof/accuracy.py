"""Step h: GMConv and its plain twin trained on photographs on the card (`tests.bench.accuracy`), while time lasts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.bench.accuracy import Settings, last, measure, photographs, precision_lines, train
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context

EPOCHS, SEEDS, BATCH, TRAIN, TEST = 5, 2, 256, 20_000, 5_000


def run(context: Context, recorder: Recorder) -> None:
    """One row for the first training, one for the comparison, one for the precisions."""
    if context.images is None and not context.rehearse:
        recorder.add("accuracy on photographs", "missing", "no folder of images was given: --images DIR")
        return
    settings = rehearsed(context.work) if context.rehearse else on_the_card(context)
    with recorder.check("training: autocast bfloat16, channels_last", measured=True) as figures:
        recorder.need(5)
        found = train(settings, photographs(settings), 1, "GMConv")
        figures["detail"] = f"{last(found):.2f} % after {settings.epochs} epochs, {found['seconds']:.0f} s"
        figures["seconds"] = found["seconds"]
        require(all(np.isfinite(epoch["loss"]) for epoch in found["history"]), "a loss is not finite")
    needs = 3 * float(figures.get("seconds", 0.0)) + 5
    with recorder.check("GMConv against its plain twin", measured=True) as figures:
        recorder.need(needs)
        lines, difference = measure(settings)
        figures |= {"mean": difference.mean, "low": difference.low, "high": difference.high, "table": lines}
        figures["detail"] = str(difference)
        needs = 0.0  # all are trained
    with recorder.check("int8 and fp8 of the masked network", measured=True) as figures:
        # Apart: exports and conversions, on the CPU, and this is the last step of a run.
        recorder.need(needs + 15)
        figures |= {"table": precision_lines(settings), "detail": "in the table below"}


def on_the_card(context: Context) -> Settings:
    """Minutes on a card; what was trained in an earlier run is used again."""
    assert context.images is not None
    return Settings(
        images=context.images,
        folder=context.work / "accuracy",
        epochs=EPOCHS,
        seeds=SEEDS,
        batch_size=BATCH,
        device="cuda",
        train_images=TRAIN,
        test_images=TEST,
    )


def rehearsed(work: Path) -> Settings:
    """Two classes of noise in files, one epoch."""
    from PIL import Image

    images = work / "photographs"
    for part, count in (("train", 8), ("test", 4)):
        for label, shade in (("dark", 60), ("light", 190)):
            folder = images / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.random.default_rng(number).normal(shade, 20, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return Settings(
        images=images,
        folder=work / "accuracy",
        epochs=1,
        seeds=2,
        size=16,
        batch_size=4,
        train_images=16,
    )
