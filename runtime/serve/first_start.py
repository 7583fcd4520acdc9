"""The entry point of the serving image: the server, with an engine built for the GPU found here first where one is due.

`python -m runtime.serve.first_start` takes the arguments of `python -m runtime.serve`.
"""

from __future__ import annotations

from gmconv import startup

if __name__ == "__main__":
    startup.prepare()

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from gmconv.cli import Command
from gmconv.errors import RefusedError
from gmconv.files import locked
from runtime.serve.models.engine_cache import Note, Profile, prepare_engine

KINDS = ("cpu", "gpu", "tensorrt", "rtx")


@click.command(cls=Command, add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(arguments: tuple[str, ...]) -> None:
    """Serve, as runtime.serve with the same arguments; GMCONV_ENGINE says what to prepare first.

    GMCONV_ENGINE: cpu (nothing), gpu (ONNX Runtime on CUDA), tensorrt or rtx (an engine for each ONNX file).
    GMCONV_ENGINE_CACHE: where engines are kept. GMCONV_ENGINE_BATCH: smallest, tuned and largest batch, "1,8,32".
    """
    from runtime.serve.__main__ import main as serve

    context = serve.make_context("runtime.serve", list(arguments))
    options = dict(context.params)
    kind = os.environ.get("GMCONV_ENGINE", "cpu")
    if kind not in KINDS:
        raise click.UsageError(f"GMCONV_ENGINE={kind!r}: it is cpu, gpu, tensorrt or rtx")
    chosen = context.get_parameter_source("device")
    if kind != "cpu" and chosen is click.core.ParameterSource.DEFAULT:
        options["device"] = "cuda"
    source: Path = options["artefact"]
    if kind in ("tensorrt", "rtx") and options["engine_cache"] is None:
        cache = Path(os.environ.get("GMCONV_ENGINE_CACHE", "/var/cache/gmconv"))
        prepare = partial(
            prepare_engine,
            cache_dir=cache,
            flavor=kind,  # type: ignore[arg-type]
            device=options["device"],
            profile=batch_profile(os.environ.get("GMCONV_ENGINE_BATCH")),
            require_manifest=options["require_manifest"],
        )
        if source.is_dir():
            options["artefact"] = prepare_folder(source, cache, prepare, model_name=options["model_name"])
        elif source.suffix == ".onnx":
            options["model_name"] = options["model_name"] or source.stem
            options["artefact"] = prepare(source)
    assert serve.callback is not None
    serve.callback(**options)


def batch_profile(text: str | None) -> Profile | None:
    """ "1,8,32" as a profile. Raises UsageError unless it is three rising batch sizes."""
    if not text:
        return None
    parts = text.split(",")
    numbers = tuple(int(p) for p in parts if p.strip().isdecimal())
    if len(parts) != 3 or len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise click.UsageError(f"GMCONV_ENGINE_BATCH={text!r}: write smallest, tuned and largest batch, such as 1,8,32")
    return numbers[0], numbers[1], numbers[2]


def prepare_folder(
    root: Path,
    cache_dir: Path,
    prepare: Callable[[Path], Path],
    *,
    model_name: str | None = None,
    note: Note = lambda text: click.echo(text, err=True),
) -> Path:
    """A folder that mirrors the models of `root` (what runtime.serve finds there) with engines for ONNX files.

    Written anew at each start as NAME/VERSION/model.plan links; an engine that is there without an ONNX file is linked
    as it is. It lies in the temporary folder, or in `cache_dir` where there is none to write to.

    Raises RefusedError (the folder, or nowhere to write to) and what `prepare` raises.
    """
    from runtime.serve.models.source import find_sources
    from runtime.serve.settings import Settings

    engines = []
    for source in find_sources(Settings(source=root, model_name=model_name, device="cpu")):
        if source.path.suffix == ".onnx":
            for other in filter(Path.exists, (source.path.with_suffix(suffix) for suffix in (".plan", ".engine"))):
                note(f"{other}: ignored; the engine is built here from {source.path.name} beside it")
            engines.append((source, prepare(source.path)))
        else:
            engines.append((source, source.path))
    mirror = make_mirror(cache_dir)
    for source, engine in engines:
        folder = mirror / source.name / source.version
        folder.mkdir(parents=True)
        for file in (engine, engine.with_name(engine.name + ".json")):
            (folder / file.name).symlink_to(file.resolve())
    return mirror


def make_mirror(cache_dir: Path) -> Path:
    """An empty folder to be served: in the temporary folder, else in `cache_dir`, where those of the dead are removed.

    Raises RefusedError when neither can be written to.
    """
    try:
        return Path(tempfile.mkdtemp(prefix="gmconv-served-"))
    except OSError:  # a read-only root without a tmpfs
        pass
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir / "served.lock"):  # so that none is seen between its making and its lock
            for left in cache_dir.glob("served-*/"):
                with contextlib.suppress(OSError):
                    os.close(_take(left))
                    shutil.rmtree(left)
            mirror = Path(tempfile.mkdtemp(prefix="served-", dir=cache_dir))
            _take(mirror)
            return mirror
    except OSError as error:
        raise RefusedError(
            f"{cache_dir}: cannot be written to ({error.strerror or error}), nor is there a temporary folder, so the "
            f"engines cannot be laid out; mount a tmpfs at /tmp, or here a volume that uid {os.getuid()} may write to"
        ) from error


def _take(mirror: Path) -> int:
    """Mark a mirror as this process's until it ends or closes the descriptor; BlockingIOError while another has it."""
    descriptor = os.open(mirror / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


if __name__ == "__main__":
    main()
