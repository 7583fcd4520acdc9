"""What a bisection found: the error of each layer, and the first one that is out of line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """One layer: `own` is its relative RMS error from the reference's inputs (NaN where that cannot be run),
    `accumulated` the one in the candidate's own run. `name` is the user's module, `sigma` its mask's, in taps.
    `precision` is the type that a graph stores the layer's weight in ("" without one). In a quantized graph
    `own_weights` is its own error with its inputs left unquantized. `after`: the layers from which operators that are
    no layer lead to it, where some do: they are compared with it, as one."""

    name: str
    ops: str
    tensor: str
    sigma: str | None
    own: float
    own_max: float
    accumulated: float
    accumulated_max: float
    precision: str = ""
    own_weights: float = math.nan
    after: str = ""


@dataclass(frozen=True, slots=True)
class Bisection:
    """The first layer out of tolerance (None: no layer is), the sentence to print, and all layers in order."""

    culprit: LayerError | None
    sentence: str
    layers: tuple[LayerError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes None."""
        layers = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(layer).items()}
            for layer in self.layers
        ]
        return {"culprit": self.culprit.name if self.culprit else None, "sentence": self.sentence, "layers": layers}


def words(layer: LayerError) -> str:
    """A layer in the words of the user's model, with its operators and its mask's sigma."""
    or_before = f", or an operator between {layer.after} and it" if layer.after else ""
    return f"{layer.name} ({layer.ops}{f', sigma {layer.sigma}' if layer.sigma else ''}){or_before}"
