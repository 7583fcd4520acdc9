"""`python -m export.tensorrt`: the builder's process starts before anything else is loaded, then the command line."""

from __future__ import annotations

import sys


def run() -> None:
    """The command: its process first, unless it is only asked for its flags."""
    if len(sys.argv) < 2 or {"-h", "--help", "--version"} & set(sys.argv):
        from export.tensorrt.command import main

        main()
    try:
        from export.tensorrt.process import BuilderProcess

        with BuilderProcess() as process:
            from export.tensorrt.command import main

            main(obj=process)
    except KeyboardInterrupt:  # before `main` could say the same
        from gmconv.stopping import exit_interrupted

        exit_interrupted()


if __name__ == "__main__":
    run()
