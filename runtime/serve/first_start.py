"""The entry point of the serving image: the server, with engines built for the GPU found here where they are due.

`python -m runtime.serve.first_start` takes the arguments of `python -m runtime.serve`.
"""

from __future__ import annotations

from gmconv.startup import prepare_process

if __name__ == "__main__":
    prepare_process()

import os
from functools import partial
from pathlib import Path

import click

from gmconv.cli import Command
from runtime.serve.models.engine_cache import Profile, prepare_engine

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
    if kind in ("tensorrt", "rtx") and options["engine_cache"] is None:
        options["prepare"] = partial(
            prepare_engine,
            cache_dir=Path(os.environ.get("GMCONV_ENGINE_CACHE", "/var/cache/gmconv")),
            flavor=kind,  # type: ignore[arg-type]
            device=options["device"],
            profile=batch_profile(os.environ.get("GMCONV_ENGINE_BATCH")),
            require_manifest=options["require_manifest"],
        )
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


if __name__ == "__main__":
    main()
