"""A container engine on a plain Debian machine: buildah, runc and podman as root, a Debian base made on the spot."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = "docker.io/library/python:3.11-slim-bookworm"
TOOLS = ("buildah", "podman", "runc", "mmdebstrap")
LIMITS = ("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096")
HARDENED = (
    "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "2g",
)  # fmt: skip
BASE_PACKAGES = "usr-is-merged,ca-certificates,python3,python3-venv"
CUSTOMIZE = (
    'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED "$1"/etc/resolv.conf; : >"$1"/etc/resolv.conf; '
    'echo localhost >"$1"/etc/hostname; ln -s /usr/bin/python3 "$1"/usr/local/bin/python'
)
"""What Debian's python3 lacks to stand for python:3.11-slim: `python` in /usr/local/bin."""


def sh(command: Sequence[str | Path], *, timeout: float = 600, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command; on failure the test shows the end of its output."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    if check and done.returncode:
        output = (done.stdout + done.stderr)[-6000:]
        pytest.fail(f"{' '.join(map(str, command))[:300]}: exit {done.returncode}\n{output}", pytrace=False)
    return done


@dataclass(frozen=True)
class Engine:
    """buildah and podman on one store that lives in `work`."""

    work: Path

    @property
    def store(self) -> list[str]:
        return ["--root", f"{self.work}/store", "--runroot", f"{self.work}/run", "--storage-driver", "overlay"]

    def buildah(self, *arguments: str | Path, timeout: float = 3000) -> str:
        return sh(["buildah", *self.store, *arguments], timeout=timeout).stdout.strip()

    def podman(self, *arguments: str | Path, check: bool = True, timeout: float = 120) -> str:
        options = ["--runtime", "runc", "--cgroup-manager", "cgroupfs"]
        return sh(["podman", *self.store, *options, *arguments], check=check, timeout=timeout).stdout.strip()

    def build(self, extras: str) -> str:
        """Build docker/Dockerfile for `extras` on the Debian base; the image's name."""
        name = f"localhost/gmconv-serve:{extras}"
        secrets: list[str] = []
        bundle = Path(os.environ.get("PIP_CERT") or "/etc/ssl/certs/ca-certificates.crt")
        if bundle.is_file():
            config = self.work / "pip.conf"
            config.write_text("[global]\ncert = /run/secrets/ca_bundle\n")
            secrets = ["--secret", f"id=pip_conf,src={config}", "--secret", f"id=ca_bundle,src={bundle}"]
        self.buildah(
            "bud", "--runtime", "runc", "--isolation", "oci", "--format", "docker", "--network", "host", "--pull-never",
            "--layers", *LIMITS, *secrets, "-f", "docker/Dockerfile", "--build-arg", f"EXTRAS={extras}",
            "--build-arg", f"BASE_IMAGE={BASE}", "-t", name, str(ROOT),
        )  # fmt: skip
        return name

    def inspect(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.podman("image", "inspect", image))[0]
        return found

    def command(self, image: str, *command: str) -> str:
        """What a shell command prints in a fresh container of the image, as its user."""
        return self.podman(
            "run", "--rm", "--network", "host", "--pull", "never", *LIMITS, "--entrypoint", command[0], image,
            *command[1:],
        )  # fmt: skip

    @contextmanager
    def run(self, image: str, *arguments: str, options: Sequence[str] = ()) -> Iterator[Container]:
        """A hardened container that ends with the block."""
        name = f"gmconv-{os.getpid()}-{time.monotonic_ns()}"
        self.podman(
            "run", "-d", "--name", name, "--network", "host", "--pull", "never", *LIMITS, *HARDENED, *options, image,
            *arguments,
        )  # fmt: skip
        try:
            yield Container(self, name)
        finally:
            self.podman("rm", "-f", "-v", "-t", "0", name, check=False)


@dataclass(frozen=True)
class Container:
    """A running container."""

    engine: Engine
    name: str

    def exec(self, *command: str, check: bool = True) -> str:
        return self.engine.podman("exec", self.name, *command, check=check)

    def logs(self) -> str:
        done = sh(["podman", *self.engine.store, "--runtime", "runc", "logs", self.name], check=False)
        return done.stdout + done.stderr

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.engine.podman("inspect", self.name))[0]["State"]
        return found

    def wait_ready(self, port: int, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with_ready = f"http://127.0.0.1:{port}/v2/health/ready"
            try:
                with urllib.request.urlopen(with_ready, timeout=2) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            if not self.state()["Running"]:
                break
            time.sleep(0.2)
        pytest.fail(f"the server in the container did not become ready:\n{self.logs()[-4000:]}", pytrace=False)


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    def pick(count: int) -> list[int]:
        sockets = [socket.socket() for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        ports = [int(s.getsockname()[1]) for s in sockets]
        for s in sockets:
            s.close()
        return ports

    return pick


def install_from_debian(tools: Sequence[str], packages: Sequence[str]) -> None:
    """Install `packages` unless every one of `tools` is there. The test fails where that cannot be."""
    if all(shutil.which(tool) for tool in tools):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.fail(f"this test needs {', '.join(tools)}: install them", pytrace=False)
    sh(["apt-get", "update", "-qq"])
    options = ["-y", "-qq", "--no-install-recommends"]
    sh(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", *options, *packages])


@pytest.fixture(scope="session")
def promtool() -> str:
    """The path of promtool; installs it from Debian where it is missing."""
    install_from_debian(["promtool"], ["prometheus"])
    return str(shutil.which("promtool"))


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The container tools and the base image; installs the tools from Debian where they are missing.

    GMCONV_IMAGE_TEST_DIR keeps the base and the layers between runs (default /var/tmp/gmconv-image-test).
    """
    if os.geteuid() != 0:
        pytest.fail("the image test builds and runs containers: run it as root", pytrace=False)
    install_from_debian(TOOLS, TOOLS)
    work = Path(os.environ.get("GMCONV_IMAGE_TEST_DIR", "/var/tmp/gmconv-image-test"))
    work.mkdir(parents=True, exist_ok=True)
    engine = Engine(work)
    if not engine.podman("images", "-q", BASE, check=False):
        _make_base(engine)
    return engine


def _make_base(engine: Engine) -> None:
    tar = engine.work / "base.tar"
    if not tar.exists():
        exclude = [f"--dpkgopt=path-exclude=/usr/share/{d}/*" for d in ("doc", "man", "locale")]
        part = tar.with_name("part.tar")
        sh(
            [
                "env", "SOURCE_DATE_EPOCH=1767225600", "mmdebstrap", "--variant=apt", f"--include={BASE_PACKAGES}",
                "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", '--aptopt=APT::Install-Recommends "false"',
                '--aptopt=Acquire::Check-Valid-Until "false"', '--aptopt=Acquire::Check-Date "false"', *exclude,
                f"--customize-hook={CUSTOMIZE}", "bookworm", str(part), "http://deb.debian.org/debian",
            ]
        )  # fmt: skip
        part.rename(tar)
    container = engine.buildah("from", "scratch")
    engine.buildah("add", "-q", container, tar, "/")
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    engine.buildah("config", "--env", f"PATH={path}", "--env", "LANG=C.UTF-8", "--cmd", "python3", container)
    engine.buildah("commit", "-q", container, BASE)
    engine.buildah("rm", container)


@pytest.fixture(scope="session")
def cpu_image(engine: Engine) -> str:
    return engine.build("cpu")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GMConv ResNet-20 exported by export.onnx, with its manifest; its weights are as initialized."""
    import gmconv
    import gmconv.models

    folder = tmp_path_factory.mktemp("exported")
    net = gmconv.models.create("resnet20", num_classes=10, in_channels=3).eval()
    labels = [f"class {i}" for i in range(10)]
    gmconv.save_checkpoint(
        folder / "resnet20.pt", net, arch="gmconv.models:resnet20", input_shape=(3, 32, 32),
        arch_kwargs={"num_classes": 10, "in_channels": 3}, labels=labels,
    )  # fmt: skip
    sh([sys.executable, "-m", "export.onnx", folder / "resnet20.pt", "-o", folder / "resnet20.onnx"])
    return folder / "resnet20.onnx"


@pytest.fixture(scope="session")
def rtx_image(engine: Engine) -> str:
    return engine.build("rtx")
