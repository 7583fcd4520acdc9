"""Expected failures of this package: one sentence each. Click prints it and exits with `exit_code`."""

from __future__ import annotations

import click


class CheckpointError(click.ClickException):
    """Exit 3: a checkpoint was refused; the message names the file and what to do."""

    exit_code = 3


class SurgeryError(click.ClickException):
    """Exit 3: a layer that cannot be converted, baked or cropped; the message names it."""

    exit_code = 3


class BakeError(SurgeryError):
    """Exit 3: a layer that cannot be baked; the message names it."""


class ArchitectureUnavailableError(click.ClickException):
    """Exit 6: the checkpoint's architecture comes from a package that is not installed."""

    exit_code = 6
