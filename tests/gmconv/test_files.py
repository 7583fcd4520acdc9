"""`gmconv.files`: what may be written where, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gmconv.errors import CheckpointError, RefusedError, UnavailableError
from gmconv.files import locked, replace_bytes, replacing, require_writable, staged, unwritable


@pytest.mark.parametrize("special", ["net.onnx", "net.onnx.json"])
def test_a_pipe_in_the_place_of_an_output_is_refused_and_stays(special: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / special)
    with pytest.raises(RefusedError, match="special file"), staged(tmp_path / "net.onnx"):
        pytest.fail("work was done before the refusal")
    assert (tmp_path / special).is_fifo()


def test_a_link_to_a_device_is_refused_and_stays(tmp_path: Path) -> None:
    link = tmp_path / "net.onnx"
    link.symlink_to("/dev/null")
    for write in (require_writable, lambda path: replace_bytes(path, b"bytes")):
        with pytest.raises(RefusedError, match="special file"):
            write(link)
    assert link.is_symlink()


def test_dev_stdout_is_a_device_even_where_the_shell_sent_it_into_a_file(tmp_path: Path) -> None:
    script = "from gmconv.files import *; from pathlib import Path\ntry: replace_bytes(Path('/dev/stdout'), b'x')\n"
    script += "except Exception as error: print(error)"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert "special file" in (tmp_path / "out").read_text()
    assert Path("/dev/stdout").is_symlink()


def test_an_output_that_is_an_input_under_any_name_is_refused_by_its_own(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"weights")
    (tmp_path / "link.pt").symlink_to("net.pt")
    with pytest.raises(RefusedError, match=r"link\.pt: is an input"):
        require_writable(tmp_path / "link.pt", None, tmp_path / "net.pt")
    require_writable(tmp_path / "new.pt", tmp_path / "net.pt")


def test_a_directory_where_the_manifest_goes_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "net.onnx.json").mkdir()
    with pytest.raises(RefusedError, match="is a directory"), staged(tmp_path / "net.onnx"):
        pytest.fail("work was done before the refusal")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx.json"]


def test_a_name_that_is_taken_meanwhile_leaves_neither_file_of_the_pair(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "net.onnx") as folder:
            (folder / "net.onnx").write_text("graph")
            (folder / "net.onnx.json").write_text("{}")
            (tmp_path / "net.onnx.json").mkdir()

    with pytest.raises(RefusedError, match="is a directory"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx.json"]


def test_a_refusal_of_what_is_staged_says_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for artefact in (tmp_path / "net.onnx", Path("net.onnx")):
        with pytest.raises(RefusedError) as refusal, staged(artefact) as folder:
            raise RefusedError(f"{folder / 'net.onnx'}: is no good")
        assert refusal.value.message == f"{artefact}: is no good"


def test_a_pair_is_replaced_also_where_the_page_cache_takes_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    artefact = tmp_path / "net.onnx"
    artefact.write_bytes(b"old")
    with staged(artefact) as folder:
        (folder / "net.onnx").write_bytes(b"new")
    assert artefact.read_bytes() == b"new"


def test_an_error_that_is_not_about_writing_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError), staged(tmp_path / "net.onnx"):
        raise ConnectionRefusedError(111, "Connection refused")
    with pytest.raises(FileNotFoundError), staged(tmp_path / "net.onnx"):
        open("/nowhere/of/the/users")  # noqa: PTH123, SIM115
    for error in (OSError(28, "No space left on device"), OSError("20 requested and 4 written")):  # numpy's
        with pytest.raises(UnavailableError, match="No space left on device"), staged(tmp_path / "net.onnx"):
            raise error
    with pytest.raises(RefusedError, match="Read-only"), staged(tmp_path / "net.onnx"):
        raise OSError(30, "Read-only file system")
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    replace_bytes(path, b"old")

    def fails() -> None:
        with replacing(path) as stream:
            stream.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fails()
    assert path.read_bytes() == b"old"
    with replacing(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_lock_is_held_by_one_and_ends_with_its_block(tmp_path: Path) -> None:
    waits: list[str] = []
    with locked(tmp_path / "lock", lambda: waits.append("waited")):
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
            pytest.fail("two holders")
        assert waits == []
    with locked(tmp_path / "lock", wait=False):
        pass


def test_a_missing_folder_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there is no folder"):
        require_writable(tmp_path / "nowhere" / "net.onnx")


def test_sigterm_leaves_no_temporary_folder(tmp_path: Path) -> None:
    script = (
        "import pathlib, time, click\nfrom gmconv.cli import Command\nfrom gmconv.files import staged\n"
        "@click.command(cls=Command)\n"
        "def main():\n"
        f"    with staged(pathlib.Path({str(tmp_path / 'net.onnx')!r})):\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "main([])\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 143
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_staged_is_swept_and_what_another_is_writing_stays(tmp_path: Path) -> None:
    killed, artefact = tmp_path / ".a.onnx.killed.tmp", tmp_path / "a.onnx"
    killed.mkdir()
    (killed / "a.onnx").write_bytes(b"half")
    with staged(artefact) as working:
        for folder in (killed, working):
            os.utime(folder, (0, 0))
        with staged(artefact) as second:
            (second / "a.onnx").write_bytes(b"whole")
        assert working.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_torchs_own_error_about_a_full_disk_is_told_by_what_it_came_of() -> None:
    try:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # noqa: B904
    except RuntimeError as error:
        full = unwritable("net.pt", error, refused=CheckpointError)
    assert (full.exit_code, full.message) == (6, "net.pt: cannot be written (No space left on device)")
    assert unwritable("net.pt", RuntimeError("words"), refused=CheckpointError).exit_code == 3
