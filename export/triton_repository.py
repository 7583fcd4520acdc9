"""Putting a version of a model into a Triton repository by one rename."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.triton_config import BACKEND_FILE, check_config, from_text, to_text
from export.triton_interface import Interface, interface_of
from runtime.errors import RefusedError
from runtime.manifest import Manifest, find_manifest, sha256_file, sidecar


def place_version(
    artefact: Path,
    manifest: Manifest | None,
    interface: Interface,
    config: Any,
    repository: Path,
    *,
    version: int,
    force: bool,
) -> Path:
    """Write `repository/<config.name>/` and its `version`; the model's folder.

    Raises RefusedError when the version exists (without `force`), config.pbtxt or the labels there say something else
    (without `force`), another version would not fit the new configuration, or the disk refuses.
    """
    model = repository / str(config.name)
    final = model / str(version)
    labels = "".join(f"{_one_line(label)}\n" for label in interface.labels or ())
    try:
        _refuse_conflicts(model, final, config, labels, version, force=force)
        repository.mkdir(parents=True, exist_ok=True)
        if not model.exists():
            with _scratch(repository, config.name) as scratch:
                _write_version(artefact, manifest, interface, scratch / str(version))
                _write_shared(scratch, config, labels)
                scratch.chmod(0o755)
                scratch.rename(model)
            return model
        with _scratch(model, str(version)) as scratch:
            _write_version(artefact, manifest, interface, scratch / "new")
            _write_shared(scratch, config, labels)
            for file in ("labels.txt", "config.pbtxt"):
                if (scratch / file).exists():
                    (scratch / file).replace(model / file)
            if final.exists():
                _swap(scratch / "new", final, scratch / "old")
            else:
                (scratch / "new").rename(final)
    except OSError as error:
        raise RefusedError(
            f"{final}: cannot be written ({error.strerror or error}); the repository serves what it served before"
        ) from error
    return model


def _refuse_conflicts(model: Path, final: Path, config: Any, labels: str, version: int, *, force: bool) -> None:
    if not model.exists():
        return
    if not model.is_dir():
        raise RefusedError(f"{model}: is a file; give another --name or -o")
    if final.exists() and not force:
        raise RefusedError(
            f"{final}: version {version} exists; write --version {version + 1}, or --force to replace it"
        )
    shared = model / "config.pbtxt"
    if shared.exists() and not force and from_text(shared.read_text("utf-8", "replace"), shared) != config:
        raise RefusedError(
            f"{shared}: differs from what these options give, and all versions of a model share it; give the options "
            f"it was written with, another --name, or --force to rewrite it"
        )
    if (model / "labels.txt").exists() and not force and (model / "labels.txt").read_text("utf-8") != labels:
        raise RefusedError(f"{model / 'labels.txt'}: holds other labels; give another --name, or --force to rewrite it")
    for other in sorted(model.iterdir()):
        if other.name.isdecimal() and other != final:
            _fits_other_version(other, config)


def _fits_other_version(folder: Path, config: Any) -> None:
    """One configuration serves every version, so the versions that stay must fit it."""
    for file in BACKEND_FILE.values():
        if (folder / file).is_file():
            found = interface_of(folder / file, find_manifest(folder / file))
            try:
                check_config(config, found)
            except RefusedError as error:
                raise RefusedError(
                    f"{folder}: would no longer fit its configuration ({error.message}); give another --name, "
                    f"or remove that version"
                ) from error


def _write_version(artefact: Path, manifest: Manifest | None, interface: Interface, folder: Path) -> None:
    folder.mkdir(mode=0o755)
    target = folder / BACKEND_FILE[interface.backend]
    if target.name in interface.external:
        raise RefusedError(f"{artefact}: its external data is itself named {target.name}; export it under another name")
    shutil.copyfile(artefact, target)
    for file in interface.external:
        shutil.copyfile(artefact.with_name(file), folder / file)
    if manifest is None:
        return
    for entry, copy in [(manifest.artefact, target), *((e, folder / e.file) for e in manifest.external)]:
        if sha256_file(copy) != entry.sha256:
            raise RefusedError(f"{artefact}: {entry.file} changed while it was copied; run this again")
    moved = replace(manifest, artefact=replace(manifest.artefact, file=target.name))
    sidecar(target).write_text(moved.to_json(), "utf-8")


def _write_shared(folder: Path, config: Any, labels: str) -> None:
    path = folder / "config.pbtxt"
    path.write_text(to_text(config), "utf-8")
    if from_text(path.read_text("utf-8"), path) != config:
        raise RefusedError(f"{path}: did not survive being written and read back; report this model's names")
    if labels:
        (folder / "labels.txt").write_text(labels, "utf-8")


def _swap(new: Path, final: Path, old: Path) -> None:
    final.rename(old)
    try:
        new.rename(final)
    except OSError:
        old.rename(final)
        raise


@contextmanager
def _scratch(parent: Path, name: str) -> Iterator[Path]:
    """A hidden folder on the same file system; Triton skips version folders that are not numbers."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _one_line(label: str) -> str:
    return " ".join(label.split())
