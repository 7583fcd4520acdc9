"""`gmconv`: every command under one name, from any folder. Each is imported only when it is called."""

from __future__ import annotations

import sys

from gmconv.startup import prepare_process

if sys.argv[1:2] == ["serve"]:
    prepare_process()

import importlib

import click

from gmconv.cli import Group
from gmconv.packages import refuse_hidden

#: Subcommand: the module that holds it, and what it does. Names, not imports: they lie above this room.
COMMANDS = {
    "train": ("gmconv.train.__main__", "Train a GMConv network on digits or a folder of images."),
    "onnx": ("export.onnx.__main__", "Turn a checkpoint into an ONNX file, proven equal to what was trained."),
    "precision": ("export.precision.__main__", "Turn an fp32 ONNX file into fp16, bf16, int8 or fp8."),
    "tensorrt": ("export.tensorrt.command", "Build an engine from an ONNX file or a checkpoint."),
    "triton": ("export.triton.__main__", "Put an artefact into a Triton model repository."),
    "parity": ("runtime.parity.__main__", "Say whether two artefacts are the same network."),
    "benchmark": ("runtime.benchmark.__main__", "Time artefacts, as trtexec does."),
    "evaluate": ("runtime.evaluate.__main__", "Measure accuracy on labelled images."),
    "serve": ("runtime.serve.__main__", "Serve an artefact over the Open Inference Protocol."),
}


class _Lazy(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        refuse_hidden()
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in COMMANDS.items()])


@click.command(
    cls=_Lazy,
    example="gmconv onnx net.pth --arch mypackage.nets:make --input-shape 3,224,224",
    epilog='Completion of the shell: eval "$(_GMCONV_COMPLETE=bash_source gmconv)" (or zsh_source, fish_source)',
)
def main() -> None:
    """Networks of Gaussian Mask Convolution to production: export, prove, time, serve."""


if __name__ == "__main__":
    main(prog_name="gmconv")
