"""The end of `make demo`: a digit to classify, and what to do next. `--open` shows the report and the page."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path

import click
import numpy as np
from PIL import Image

from gmconv.cli import Command
from gmconv.data import load_samples

NEXT = """
The last row above: the cropped network's latency over its plain twin's, on this machine, one thread.

reports              {folder}/index.html (proof.html, cropping.html)
serve it             {bin}/gmconv serve {folder}/digits.onnx --model-name digits    # and a page: localhost:8000
classify a digit {digit}   curl -s --data-binary @{folder}/digit.png localhost:8000/v2/models/digits/classify
your own checkpoint  {bin}/gmconv onnx state.pth --arch mypackage.nets:make --input-shape 3,64,64"""


def write_digit(path: Path) -> int:
    """A held-out digit as a PNG of 8 x 8 grey pixels, and which one it is."""
    batch = next(iter(load_samples("digits", input_shape=(1, 8, 8), dataset={"name": "digits"}, limit=1)))
    assert batch.labels is not None
    Image.fromarray(np.round(batch.images[0, 0] * 255).astype(np.uint8)).save(path)
    return int(batch.labels[0])


def show(folder: Path) -> None:
    """Open the report, then the page of a server that runs until Ctrl-C."""
    report = (folder / "proof.html").resolve().as_uri()
    if not webbrowser.open(report):
        click.echo(f"\nno browser opens here: the report is {report}, the page will be http://localhost:8000")
    click.echo("\nserving until Ctrl-C")
    command = [sys.executable, "-m", "runtime.serve", str(folder / "digits.onnx"), "--model-name", "digits"]
    with subprocess.Popen(command) as server, contextlib.suppress(KeyboardInterrupt):
        for _ in range(100):
            if server.poll() is not None:  # it has said why
                break
            with contextlib.suppress(OSError), urllib.request.urlopen("http://localhost:8000/v2/health/ready"):
                webbrowser.open("http://localhost:8000")
                break
            time.sleep(0.3)
        server.wait()


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--open", "opened", is_flag=True)
def main(folder: Path, opened: bool) -> None:
    """Write FOLDER/digit.png and print the next steps."""
    digit = write_digit(folder / "digit.png")
    click.echo(NEXT.format(folder=folder, digit=digit, bin=Path(sys.executable).parent))
    if opened:
        show(folder)


if __name__ == "__main__":
    main()
