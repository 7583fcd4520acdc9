"""Putting a version of a model into a Triton repository, or replacing one, in one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.triton.config import BACKEND_FILE, check_config, from_text, to_text
from export.triton.interface import Interface, interface_of
from export.triton.staging import Staging, fill, link_tree, staging
from gmconv.errors import RefusedError
from gmconv.files import sha256_file, sync, unwritable
from runtime.manifest import Manifest, find_manifest, sidecar

_CONFIG, _LABELS = "config.pbtxt", "labels.txt"


def place_version(
    artefact: Path,
    manifest: Manifest | None,
    interface: Interface,
    config: Any,
    repository: Path,
    *,
    version: int,
    force: bool,
) -> tuple[Path, str]:
    """Write `repository/<config.name>/` and its `version`; the model's folder, and what --force did to other versions.

    A version that fits what is there appears by one rename. Anything else (a new model, a version replaced, another
    configuration) is made as a whole model folder, the versions that stay linked into it, and shown in one step, so
    that no configuration ever lies beside a version it was not checked against.

    Raises RefusedError when the version exists (without `force`), config.pbtxt or the labels there say something else
    (without `force`), another version would not fit the new configuration, another run is at work on the model, or the
    disk refuses.
    """
    model = repository / str(config.name)
    final = model / str(version)
    labels = "".join(f"{_one_line(label)}\n" for label in interface.labels or ()).encode()
    made = not repository.exists()
    if not made and not repository.is_dir():
        raise RefusedError(f"{repository}: is a file, and a repository is a folder of models; give another -o")
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with staging(repository, str(config.name)) as stage:
            _refuse_conflicts(model, final, config, labels, version, force=force)
            note = _relabelled(model, final, labels)
            shared = _changed_shared(model, config, labels)
            adds = model.exists() and not final.exists() and not shared
            stage.choose(model if adds else repository)
            files = _stage_version(artefact, manifest, interface, stage)
            if adds:
                stage.folder.mkdir()
                fill(stage.folder, files)
                stage.folder.rename(final)
                sync(model)
            else:
                _make_model(stage, str(version), files, shared)
                stage.publish()
    except OSError as error:
        raise unwritable(final, error, "; the repository serves what it served before") from error
    finally:
        if made:
            with suppress(OSError):  # it holds the model
                repository.rmdir()
    return model, note


def _refuse_conflicts(model: Path, final: Path, config: Any, labels: bytes, version: int, *, force: bool) -> None:
    if model.is_symlink():
        real = model.resolve()
        raise RefusedError(f"{model}: is a link; write where it points, with -o {real.parent} --name {real.name}")
    if not model.exists():
        return
    if not model.is_dir():
        raise RefusedError(f"{model}: is a file; give another --name or -o")
    if final.exists() and not force:
        raise RefusedError(
            f"{final}: version {version} exists; write --version {version + 1}, or --force to replace it"
        )
    for other in sorted(model.iterdir()):  # first: what --force cannot mend is not refused with the advice to take it
        if other.name.isdecimal() and other != final:
            _fits_other_version(other, config)
    shared, there = model / _CONFIG, _labels_of(model)
    found = from_text(shared.read_text("utf-8", "replace"), shared) if shared.exists() and not force else config
    if not force and there != labels and (there or found != config):
        raise RefusedError(
            f"{model / _LABELS}: {config.name} has {_count(there)} and the artefact {_count(labels)}, not the same, "
            f"and all versions of a model share them; export with those, give another --name, or --force to rewrite it"
        )
    if found != config:
        raise RefusedError(
            f"{shared}: {'; '.join(_differences(found, config))}; all versions of a model share it: give the options "
            f"it was written with, another --name, or --force to rewrite it"
        )


def _labels_of(model: Path) -> bytes:
    return (model / _LABELS).read_bytes() if (model / _LABELS).exists() else b""


def _count(labels: bytes) -> str:
    return f"{len(labels.splitlines())} labels" if labels else "no labels"


def _relabelled(model: Path, final: Path, labels: bytes) -> str:
    """What becomes of versions that stay, where the artefact's labels replace theirs; empty where nothing does."""
    there = _labels_of(model)
    others = [entry.name for entry in model.iterdir() if entry.name.isdecimal() and entry != final] if there else []
    if not others or there == labels:
        return ""
    versions = f"version {', '.join(sorted(others))}"
    now = f"answers with the new {_count(labels)}" if labels else "is served without them"
    return f"{model / _LABELS} had {_count(there)}: {versions} {now} from now on"


def _differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """Where two messages of one type differ, field by field."""
    for field in there.DESCRIPTOR.fields:
        old, new, name = getattr(there, field.name), getattr(here, field.name), f"{where}{field.name}"
        if old == new:
            continue
        if isinstance(old, str | int | float):
            names = field.enum_type.values_by_number if field.enum_type else {}
            old, new = (names[value].name if value in names else value for value in (old, new))
            yield f"{name} is {old!r}, and {new!r} by these options"
        elif hasattr(old, "DESCRIPTOR"):
            yield from list(_differences(old, new, f"{name}.")) or [f"{name} differs"]
        elif not hasattr(old, "keys") and len(old) == len(new) and all(hasattr(item, "DESCRIPTOR") for item in old):
            for index, pair in enumerate(zip(old, new, strict=True)):
                yield from _differences(*pair, f"{name}[{index}].")
        else:
            yield f"{name} differs"


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


def _changed_shared(model: Path, config: Any, labels: bytes) -> dict[str, bytes | None]:
    """What config.pbtxt and labels.txt of a model must become, each only if it is not that already; None: no file."""
    changed: dict[str, bytes | None] = {}
    path = model / _CONFIG
    if not _says(path, config):
        text = to_text(config)
        if from_text(text, path) != config:
            raise RefusedError(f"{path}: would not survive being written and read back; report this model's names")
        changed[_CONFIG] = text.encode()
    if labels != _labels_of(model):
        changed[_LABELS] = labels or None
    return changed


def _says(path: Path, config: Any) -> bool:
    try:
        return bool(from_text(path.read_text("utf-8", "replace"), path) == config)
    except (FileNotFoundError, RefusedError):  # a damaged one, which --force replaces
        return False


def _stage_version(artefact: Path, manifest: Manifest | None, interface: Interface, stage: Staging) -> dict[str, Path]:
    """Staged copies of the artefact, its external data and its manifest, by their names in the version's folder."""
    target = BACKEND_FILE[interface.backend]
    manifest_name = sidecar(Path(target)).name
    if clash := {target, manifest_name} & set(interface.external):
        raise RefusedError(f"{artefact}: its external data is itself named {clash.pop()}; export it under another name")
    files = {target: stage.copy(artefact)}
    files |= {file: stage.copy(artefact.with_name(file)) for file in interface.external}
    if manifest is None:
        return files
    for entry, copy in [(manifest.artefact, files[target]), *((e, files[e.file]) for e in manifest.external)]:
        if sha256_file(copy) != entry.sha256:
            raise RefusedError(f"{artefact}: {entry.file} changed while it was copied; run this again")
    moved = replace(manifest, artefact=replace(manifest.artefact, file=target))
    return files | {manifest_name: stage.write(moved.to_json().encode())}


def _make_model(stage: Staging, version: str, files: dict[str, Path], shared: dict[str, bytes | None]) -> None:
    """Make the whole model folder: what stays of the old one, the version, and what of the shared files changes."""
    shared_files = {name: stage.write(data) for name, data in shared.items() if data is not None}
    if stage.model.exists():
        link_tree(stage.model, stage.folder, frozenset({version, *shared}))
    else:
        stage.folder.mkdir()
    (stage.folder / version).mkdir()
    fill(stage.folder / version, files)
    fill(stage.folder, shared_files)


def _one_line(label: str) -> str:
    return " ".join(label.split())
