"""What a build writes, onto a disk that is full."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.tensorrt.write import LogFile
from gmconv.errors import UnavailableError


def test_a_log_that_could_not_be_written_is_told_by_its_check_alone(tmp_path: Path) -> None:
    (tmp_path / "trt.log").symlink_to("/dev/full")
    log = LogFile(tmp_path / "trt.log")
    for _ in range(2):
        log.write("[INFO] a line\n")  # from a native callback, which nothing may be raised through
    with pytest.raises(UnavailableError, match=r"--log .*trt\.log: cannot be written \(No space left"):
        log.check()
    log.close()


def test_a_log_that_is_whole_stays(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "trt.log")
    log.write("[INFO] a line\n")
    log.check()
    log.close()
    assert (tmp_path / "trt.log").read_text() == "[INFO] a line\n"
