"""Kernels that a network computes in its forward but that do not depend on its input: found, stored, certified."""

from gmconv.constants.bake import Baked, Dynamic, bake_constants
from gmconv.constants.network import bake_for_inputs, bake_network

__all__ = ["Baked", "Dynamic", "bake_constants", "bake_for_inputs", "bake_network"]
