"""An artefact as one version of a model in a Triton repository: the function behind `python -m export.triton`.

Writes `<repository>/<name>/config.pbtxt` and `<repository>/<name>/<version>/model.onnx` (backend "onnxruntime") or
`model.plan` (backend "tensorrt"). The configuration is built, written and read back through Triton's own protobuf
message, and compared with the artefact, so it does not depend on the server's auto-completion (which would cap ONNX
models at batch 4). Fields: docs/user_guide/model_configuration.md of github.com/triton-inference-server/server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.triton.config import ServingOptions, batching_note, check_config, model_config
from export.triton.interface import interface_of
from export.triton.repository import place_version
from gmconv.asking import Asked
from gmconv.errors import RefusedError
from runtime.manifest import find_manifest, sidecar
from runtime.metadata import refuse_untrue
from runtime.runners.qdq import layout_warning

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryEntry:
    """What `write_repository` wrote: the model's folder, the version's folder and the served batch limit.

    `note` says, where there is something to say, why Triton batches less than the artefact seems to offer, and what
    became of the labels of other versions. `warnings`: what to know before trusting it, one sentence each.
    """

    model: Path
    version: Path
    config: Path
    name: str
    backend: str
    max_batch_size: int
    note: str | None = None
    warnings: tuple[str, ...] = ()


_ASKED = Asked(
    ServingOptions,
    "export.triton.__main__:main",
    renamed={"policy": "version_policy", "shape": "warmup_shapes"},
    objects=("warmup_shapes",),
)


@_ASKED.of
def write_repository(
    artefact: str | Path,
    repository: str | Path,
    options: ServingOptions | None = None,
    *,
    name: str | None = None,
    version: int = 1,
    force: bool = False,
    **choices: Any,
) -> RepositoryEntry:
    """Place `artefact` (an ONNX file or an engine) into the Triton repository `repository` as `name`/`version`.

    A server that reads the repository meanwhile, or after this was killed, finds what was there before or the new
    model, whole; what is there already is refused unless `force`. With several versions the one config.pbtxt of a model
    must fit them all, which is checked even under `force`. `choices` are fields of `ServingOptions` by name and value
    as on the command line: max_batch, instances, kind, gpus, delay, max_queue, queue_timeout, policy, warmup,
    warmup_shapes, cuda_graphs, threads. Raises TypeError for another.

    An ONNX file without a manifest is taken, with a warning. Raises RefusedError when the artefact, its manifest or the
    name is refused, the engine cannot be loaded by Triton (TensorRT-RTX), the options do not fit the artefact, the
    repository holds something else under that name, or another run is writing that model.
    """
    artefact, repository, options = Path(artefact), Path(repository), _ASKED(options, choices)
    name = artefact.stem if name is None else name
    if not _NAME.fullmatch(name):
        raise RefusedError(f"model name {name[:80]!r}: Triton takes letters, digits, '_', '-' and '.'; give --name")
    if version < 1:
        raise RefusedError(f"version {version}: Triton's versions are whole numbers from 1")
    manifest = find_manifest(artefact)
    interface = interface_of(artefact, manifest)
    if manifest is not None:
        refuse_untrue(manifest)
    config = model_config(name, interface, options)
    check_config(config, interface)
    model, relabelled = place_version(artefact, manifest, interface, config, repository, version=version, force=force)
    device = "cuda" if options.kind == "gpu" or options.gpus else options.kind
    unfit = None if device == "auto" else layout_warning(manifest, device)
    batching = batching_note(interface, config.max_batch_size) if options.max_batch is None else None
    return RepositoryEntry(
        model=model,
        version=model / str(version),
        config=model / "config.pbtxt",
        name=name,
        backend=interface.backend,
        max_batch_size=config.max_batch_size,
        note="; ".join(filter(None, (relabelled, batching))) or None,
        warnings=(*(manifest.warnings if manifest else (_unproven(artefact),)), *([unfit] if unfit else ())),
    )


def _unproven(artefact: Path) -> str:
    return (
        f"{artefact}: it has no manifest, so nothing proves it, and Triton gets neither labels nor a record of "
        f"preprocessing; export it with gmconv onnx, or copy {sidecar(artefact).name} beside it"
    )
