"""What a server's settings resolve to."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from gmconv.errors import RefusedError, UnavailableError
from runtime import cuda
from runtime.manifest import Manifest, digest, sidecar
from runtime.serve import settings as module
from runtime.serve.auth import find_token
from runtime.serve.models.source import Source
from runtime.serve.models.version import open_runners
from runtime.serve.server import check, serve
from runtime.serve.settings import Settings

from .conftest import classifier, parse


@pytest.mark.parametrize(
    "flags",
    [
        ("--queue-timeout", "inf"),
        ("--shed-target", "nan"),
        ("--max-queue-delay", "nan"),
        ("--body-timeout", "0"),
        ("--no-http", "--no-grpc", "--no-metrics"),
        ("--no-http", "--no-grpc"),
        ("--engine", "rtx"),
        ("--threads", "1025"),
        ("--solo-threads", "1025"),
        ("--http-port", "9000", "--grpc-port", "9000"),
    ],
)
def test_what_limits_nothing_or_serves_nobody_is_a_usage_error(flags: tuple[str, ...]) -> None:
    with pytest.raises(click.UsageError):
        check(parse("m.onnx", *flags))


@pytest.mark.skipif(cuda.driver_problem() is None, reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "has no CUDAExecutionProvider|cuda:0 was asked"), ("tpu", "unkn")]
)
def test_a_device_that_there_is_not_is_refused_before_a_port_is_opened(device: str, words: str, tmp_path: Path) -> None:
    with pytest.raises((UnavailableError, RefusedError), match=words):
        check(parse(str(classifier(tmp_path / "m.onnx")), "--device", device))


@pytest.mark.skipif(cuda.driver_problem() is None, reason="this machine has a GPU")
def test_an_engine_is_refused_before_a_port_is_opened_where_there_is_no_gpu(tmp_path: Path) -> None:
    plan = tmp_path / "m.plan"
    plan.write_bytes(b"engine")
    sidecar(plan).write_text(Manifest(artefact=digest(plan, "engine"), inputs=(), outputs=()).to_json())
    with pytest.raises(UnavailableError, match="an engine runs on an NVIDIA GPU"):
        check(parse(str(plan)))


def test_the_token_comes_from_the_file_else_from_the_caller_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokens = tmp_path / "token", {name: name * 16 for name in "abc"}
    file.write_text(tokens["a"] + "\n")
    monkeypatch.setenv("GMCONV_SERVE_TOKEN", tokens["c"])
    assert find_token(Settings(source=tmp_path, token=tokens["b"], token_file=file)) == tokens["a"]
    assert find_token(Settings(source=tmp_path, token=tokens["b"])) == tokens["b"]
    assert find_token(Settings(source=tmp_path)) == tokens["c"]
    for weak in ("", "short", "with a space inside"):
        with pytest.raises(RefusedError, match="GMCONV_SERVE_TOKEN: the token must"):
            find_token(Settings(source=tmp_path, token=weak))
    monkeypatch.delenv("GMCONV_SERVE_TOKEN")
    assert find_token(Settings(source=tmp_path)) is None


@pytest.mark.parametrize(
    ("given", "threads", "solo"),
    [
        ({}, 8, 0),
        ({"instances": 4}, 2, 8),
        ({"instances": 8, "threads": 4}, 4, 8),
        ({"instances": 2, "threads": 1}, 1, 2),
        ({"instances": 2, "solo_threads": 0}, 4, 0),
        ({"solo_threads": 3}, 8, 3),
        ({"instances": 100}, 1, 8),
    ],
)
def test_threads_share_the_cores_and_a_lone_request_gets_them_all(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, int], threads: int, solo: int
) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    settings = Settings(source=Path(), **given)  # type: ignore[arg-type]
    assert (settings.intra_op_threads, settings.solo_intra_op_threads) == (threads, solo)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, float("inf")),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),
        ({"cpu/a/b/cpu.cfs_quota_us": "50000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
    ],
)
def test_the_cpu_quota_of_either_version_of_control_groups(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,cpuacct:/a/b\n0::/a/b\n")
    assert module.cpu_quota(tmp_path / "root", membership) == cores


@pytest.mark.parametrize(("solo_threads", "extra"), [(0, False), (2, True)])
def test_one_engine_per_instance_and_one_for_a_lone_request(tmp_path: Path, solo_threads: int, extra: bool) -> None:
    path = classifier(tmp_path / "m.onnx")
    runners, solo = open_runners(
        Source("m", "1", path), Settings(source=path, instances=2, threads=1, solo_threads=solo_threads)
    )
    assert len(runners) == 2
    assert (solo is not None) is extra
    for runner in [*runners, *([solo] if solo else [])]:
        runner.close()


def test_an_engine_is_deserialized_once_for_all_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instance has contexts of its own, for batches of a few sizes; nothing is compiled inside a request."""
    opened: list[tuple[Path, str, dict[str, object]]] = []

    class Engine:
        def share(self) -> Engine:
            return Engine()

    def open_engine(path: Path, device: str, **options: object) -> Engine:
        opened.append((path, device, options))
        return Engine()

    monkeypatch.setattr("runtime.runners.open_runner", open_engine)
    path = tmp_path / "m.plan"
    runners, solo = open_runners(Source("m", "1", path), Settings(source=path, instances=3, threads=1, device="cuda:0"))
    assert (len(set(map(id, runners))), solo) == (3, None)
    assert opened == [(path, "cuda:0", {"lazy": True, "batches": "auto"})]


def test_serve_says_in_one_sentence_how_to_serve_from_a_notebook_or_a_thread() -> None:
    said = r"in a notebook start a process: subprocess.Popen\(\[sys.executable, '-m', 'runtime.serve', 'net.onnx'\]\)$"
    with ThreadPoolExecutor(1) as thread, pytest.raises(RefusedError, match=said):
        thread.submit(serve, "net.onnx").result()

    async def cell() -> None:
        serve("net.onnx")

    with pytest.raises(RefusedError, match=said):
        asyncio.run(cell())
