"""Manifests of schema v1, as gmconv-deploy 0.1 and 0.2 wrote them, brought to the shape of v2.

v1 had one `build` for two things and two shapes of `parity`; everything else only became typed.
"""

from __future__ import annotations

from typing import Any

SCHEMA_V1 = "gmconv-deploy.manifest/v1"


def upgrade(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a v1 manifest under v2's names; what they hold is checked by whoever reads v2."""
    build, inputs = fields.get("build") or {}, [i.get("name", "") for i in fields.get("inputs") or ()]
    return fields | {
        "export": build if "opset" in build else None,
        "build": build if "flavor" in build else None,
        "parity": _parity(fields.get("parity"), inputs, (fields.get("artefact") or {}).get("file", "")),
    }


def _parity(parity: dict[str, Any] | None, inputs: list[str], file: str) -> dict[str, Any] | None:
    if not parity:
        return None
    result = str(parity.get("result", "passed"))
    if result.startswith("not run"):
        return {"result": "not run", "reason": result.removeprefix("not run").strip(" ()")}
    kept: dict[str, Any] = {key: parity[key] for key in ("reference", "engine", "yardstick", "notes") if key in parity}
    hops = [_exported(hop, inputs) for hop in parity.get("hops", ())]
    reference = parity.get("reference", "")
    for case in parity.get("cases", ()):
        shapes = [[int(n) for n in shape.split("x") if n] for shape in case["shape"].split(", ")]
        ends = {"name": f"{reference} -> {file}", "reference": reference, "candidate": file}
        ran = {"inputs": case["label"], "shapes": dict(zip(inputs, shapes, strict=False))}
        hops.append({**ends, **ran, "outputs": case["outputs"], "tolerance": parity.get("tolerance")})
    return {**kept, "result": "passed", "hops": hops}


def _exported(hop: dict[str, Any], inputs: list[str]) -> dict[str, Any]:
    """One arrow of an export's proof: v1's only input, its shape a plain list."""
    reference, _, candidate = hop["hop"].partition(" -> ")
    shapes = {inputs[0]: hop["shape"]} if inputs and "shape" in hop else {}
    ends = {"name": hop["hop"], "reference": reference, "candidate": candidate}
    return {**ends, "inputs": hop["case"], "shapes": shapes, "bitwise": hop["bitwise"], "outputs": hop["outputs"]}
