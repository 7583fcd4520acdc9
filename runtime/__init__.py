"""Run an artefact, compare it, time it, serve it. Imports no torch outside `runtime.runners.torch`."""
