"""How an artefact is timed: trtexec's loop, metrics and output, on every runner."""
