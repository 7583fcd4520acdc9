"""Images as strangers send them: work that a file's size does not show is bounded, and never holds the server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack

import pytest
from PIL import Image

from gmconv.images import FORMATS
from runtime.serve.errors import RequestError
from runtime.serve.http.app import PAGE
from runtime.serve.http.images import Decoders

from ..conftest import IMAGE, Server, classifier

Start = Callable[..., Server]
CLASSIFY = "/v2/models/m/classify"


def scans(count: int, side: int = 5792) -> bytes:
    """A progressive JPEG of `side` x `side` pixels and few kB, each of whose scans is a pass over all of them."""
    bits = ("0" + "1" * 14) * 17
    bits += "1" * (-len(bits) % 8)
    runs = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")

    def segment(marker: int, content: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + pack(">H", len(content) + 2) + content

    out = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    out += segment(0xC2, pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    out += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + bytes([0]))
    out += segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + bytes([0xE0]))
    out += segment(0xDA, bytes([1, 1, 0x00, 0, 0, 0x01])) + b"\x00" * 4
    return out + (segment(0xDA, bytes([1, 1, 0x00, 1, 63, 0x10])) + runs) * count + b"\xff\xd9"


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_scans_sides_and_memory_have_limits_and_the_next_image_is_read(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))
    for body, why in (
        (scans(600), b"more than 500 scans"),
        (png(1, 30_001), b"no side may be longer"),
        (b"", b"the body is empty; send the image file"),
    ):
        status, _, answer = server.request("POST", CLASSIFY, body)
        assert status == 400
        assert why in answer
    assert server.request("POST", CLASSIFY, png(8, 8))[0] == 200


def test_packages_of_our_names_in_the_working_directory_are_nobodys_code_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server started there answered every image with 500, from code that lay beside the file it served."""
    for name in ("runtime", "gmconv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)

    async def run() -> None:
        decoders = Decoders(1, 20)
        assert (await decoders.decode(png(8, 8), IMAGE)).shape == (3, 8, 8)
        (process,) = decoders._all
        decoders.close()
        await process.wait()

    asyncio.run(run())


def test_the_page_names_the_formats_that_are_decoded() -> None:
    page = (PAGE / "index.html").read_text()
    assert "JPEG, PNG, WebP, BMP or PPM." in page
    assert FORMATS == ("JPEG", "PNG", "WEBP", "BMP", "PPM")


def test_an_image_that_is_none_costs_no_process() -> None:
    async def run() -> None:
        decoders = Decoders(1, 20)
        await decoders.warm_up()
        (process,) = decoders._all
        with pytest.raises(RequestError, match="not a JPEG"):
            await decoders.decode(b"no image", IMAGE)
        assert (await decoders.decode(png(8, 8), IMAGE)).shape == (3, 8, 8)
        assert decoders._all == {process}
        decoders.close()
        await process.wait()

    asyncio.run(run())


def test_an_image_under_decoding_does_not_hold_up_the_end(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), "--drain-timeout", "0.5")

    def send() -> None:
        with contextlib.suppress(OSError):
            server.request("POST", CLASSIFY, scans(490))

    threading.Thread(target=send, daemon=True).start()
    time.sleep(0.5)
    assert server.request("GET", "/v2/health/live")[0] == 200
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 4


def test_a_form_is_answered_with_how_to_send_the_file_itself(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))
    form = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nbytes\r\n--x--\r\n'
    urlencoded = "application/x-www-form-urlencoded"
    for body, kind in (
        (form, "multipart/form-data; boundary=x"),
        (png(8, 8).translate(None, b"\0\r\n"), urlencoded),  # as curl -d sends a file
    ):
        answer = server.request("POST", CLASSIFY, body, {"Content-Type": kind})
        assert answer[0] == 400
        assert b"--data-binary @image.png" in answer[-1]
    assert server.request("POST", CLASSIFY, png(8, 8), {"Content-Type": urlencoded})[0] == 200  # whole all the same
