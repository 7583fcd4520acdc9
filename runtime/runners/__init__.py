"""One `Runner` per inference engine; `open_runner` picks by artefact."""
