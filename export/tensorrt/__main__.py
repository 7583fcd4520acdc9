"""`python -m export.tensorrt`: an exported ONNX file (or a checkpoint) becomes a TensorRT engine and its manifest.

The builder's process starts before anything else is loaded, so this module holds only that start. The function behind
it, `build_engine`, and `BuildOptions` come from `export._trt_build` when they are first asked for, the command line
from `export._trt_cli`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export._trt_build import BuildOptions as BuildOptions
    from export._trt_build import build_engine as build_engine


def __getattr__(name: str) -> Any:
    if name in ("BuildOptions", "build_engine"):
        from export import _trt_build

        return getattr(_trt_build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run() -> None:
    """The command: its process first, unless it is only asked for its flags."""
    if len(sys.argv) < 2 or "--help" in sys.argv:
        from export._trt_cli import main

        main()
    try:
        from export._trt_process import BuilderProcess

        with BuilderProcess() as process:
            from export._trt_cli import main

            main(obj=process)
    except KeyboardInterrupt:  # before `main` could say the same
        from runtime.cli import exit_interrupted

        exit_interrupted()


if __name__ == "__main__":
    run()
