"""The end of `make demo`: a digit to classify, and what to do next. `--open` shows the report and the page."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from pathlib import Path

import click
import numpy as np
from PIL import Image

from gmconv.cli import Command, echo
from gmconv.data import load_samples

NEXT = """
The last row above: the cropped network's latency over its plain twin's, on this machine, one thread.

reports              {folder}/index.html (proof.html, cropping.html)
serve it             {gmconv} serve {folder}/digits.onnx --model-name digits    # and a page: localhost:8000
classify a digit {digit}   curl -s --data-binary @{folder}/digit.png localhost:8000/v2/models/digits/classify
your own checkpoint  {gmconv} onnx state.pth --arch mypackage.nets:make --input-shape 3,64,64"""


def write_digit(path: Path) -> int:
    """A held-out digit as a PNG of 8 x 8 grey pixels, and which one it is."""
    batch = next(iter(load_samples("digits", input_shape=(1, 8, 8), dataset={"name": "digits"}, limit=1)))
    assert batch.labels is not None
    Image.fromarray(np.round(batch.images[0, 0] * 255).astype(np.uint8)).save(path)
    return int(batch.labels[0])


def free_port(wanted: int) -> int:
    """`wanted`, or another where somebody listens there: his page is not the one to open."""
    with socket.socket() as taken:
        if taken.connect_ex(("localhost", wanted)) != 0:
            return wanted
    with socket.create_server(("localhost", 0)) as free:
        return int(free.getsockname()[1])


def show(folder: Path) -> None:
    """Open the report, then the page of a server that runs until Ctrl-C."""
    report = (folder / "proof.html").resolve().as_uri()
    page = f"http://localhost:{(port := free_port(8000))}"
    if not webbrowser.open(report):
        echo(f"\nno browser opens here: the report is {report}, the page will be {page}")
    echo("\nserving until Ctrl-C")
    command = [sys.executable, "-m", "runtime.serve", str(folder / "digits.onnx"), "--model-name", "digits"]
    command += ["--http-port", str(port), "--no-grpc", "--no-metrics"]
    with subprocess.Popen(command) as server, contextlib.suppress(KeyboardInterrupt):
        for _ in range(100):
            if server.poll() is not None:  # it has said why
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{page}/v2/health/ready"):
                webbrowser.open(page)
                break
            time.sleep(0.3)
        server.wait()


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--open", "opened", is_flag=True)
def main(folder: Path, opened: bool) -> None:
    """Write FOLDER/digit.png and print the next steps."""
    digit = write_digit(folder / "digit.png")
    here, command = shlex.quote(str(folder)), shlex.quote(str(Path(sys.executable).with_name("gmconv")))
    echo(NEXT.format(folder=here, digit=digit, gmconv=command))
    if opened:
        show(folder)


if __name__ == "__main__":
    main()
