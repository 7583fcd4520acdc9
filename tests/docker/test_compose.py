"""docker/compose.yaml, alone and with compose.cpu.yaml over it: valid, hardened, mounting what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCHEMA = get_builtin_schema("vendor.compose-spec")
RESET = object()


class ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's `!reset` tag, which takes out what the file below set."""


ComposeLoader.add_constructor("!reset", lambda loader, node: RESET)


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((DOCKER / name).read_text(), ComposeLoader)
    return found


def merge(below: Any, over: Any) -> Any:
    """Compose's merge of two files, as far as ours go: maps by key, `!reset` deletes, scalars replace."""
    if isinstance(below, dict) and isinstance(over, dict):
        kept = {k: v for k, v in below.items() if over.get(k) is not RESET}
        return kept | {k: merge(below.get(k), v) for k, v in over.items() if v is not RESET}
    assert not isinstance(over, list), "Compose appends lists: extend this merge first"
    if isinstance(over, dict):
        return merge({}, over)
    return over


@pytest.fixture(params=["gpu", "cpu"])
def compose(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `docker compose` reads: compose.yaml, or the two files together."""
    below = load("compose.yaml")
    merged: dict[str, Any] = below if request.param == "gpu" else merge(below, load("compose.cpu.yaml"))
    return merged


def test_it_fits_the_compose_specification(compose: dict[str, Any]) -> None:
    """check-jsonschema --builtin-schema vendor.compose-spec, in this process: it does not read Compose's own tags."""
    jsonschema.validate(compose, SCHEMA)
    compose["services"]["serve"]["read_olny"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(compose, SCHEMA)


def test_without_a_gpu_the_cpu_image_is_built_and_no_device_reserved() -> None:
    merged = merge(load("compose.yaml"), load("compose.cpu.yaml"))["services"]["serve"]
    assert merged["image"] == "gmconv-serve:cpu"
    assert merged["build"]["args"] == {"EXTRAS": "cpu"}
    assert merged["build"]["dockerfile"] == "docker/Dockerfile", "the override keeps what it does not name"
    assert merged["deploy"]["resources"]["reservations"] == {}
    assert merged["deploy"]["resources"]["limits"]["memory"]


def test_one_gpu_is_reserved() -> None:
    (device,) = load("compose.yaml")["services"]["serve"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_it_mounts_what_exists_and_writes_nowhere_else(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service["volumes"]:
            if isinstance(volume, str) and volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).exists(), volume
    assert compose["services"]["serve"]["read_only"] is True
    assert set(compose["volumes"]) >= {"engine-cache"}


def test_the_models_are_the_demos_and_a_misspelt_folder_is_an_error(compose: dict[str, Any]) -> None:
    """Compose takes a relative source from the file's folder, and would make a missing one, empty and root's."""
    (models,) = (v for v in compose["services"]["serve"]["volumes"] if isinstance(v, dict))
    default = re.fullmatch(r"\$\{MODELS:-(.+)\}", models["source"])
    assert default
    assert (DOCKER / default[1]).resolve() == ROOT / "demo"
    assert models["bind"] == {"create_host_path": False}


@pytest.mark.parametrize("name", ["README.md", "compose.yaml"])
def test_the_documented_models_folder_does_not_depend_on_where_compose_looks(name: str) -> None:
    commands = re.findall(r"MODELS=(\S+) docker compose", (DOCKER / name).read_text())
    assert commands
    assert all(value.startswith(("$PWD/", '"$PWD/')) for value in commands), commands


def test_the_server_comes_back_after_a_reboot(compose: dict[str, Any]) -> None:
    """It drains on SIGTERM and exits 0: of the restart policies, on-failure would leave it down then."""
    assert {service["restart"] for service in compose["services"].values()} == {"unless-stopped"}
