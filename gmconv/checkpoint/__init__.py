"""Checkpoints: writing one, and reading one of ours or of anybody's training script, running nothing that is in it."""

from gmconv.checkpoint.load import SCHEMA, Checkpoint, load_checkpoint, save_checkpoint

__all__ = ["SCHEMA", "Checkpoint", "load_checkpoint", "save_checkpoint"]
