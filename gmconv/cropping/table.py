"""A crop certificate in words: the table of what was cropped, and one sentence about all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gmconv.errors import ROOT

if TYPE_CHECKING:
    from gmconv.tables import Table


def crop_table(certificate: dict[str, Any]) -> Table:
    """The table of the layers that lost taps, from a certificate dict as the manifest stores it."""
    from gmconv.tables import Column, Table, number

    layers = [layer for layer in certificate["layers"] if layer["kernel"] != layer["kept"]]
    clocked = any(layer.get("latency_after_ms") is not None for layer in layers)
    data = certificate.get("measured_on") or "the caller's"
    seen = any(layer["measured"] is not None for layer in layers)
    table = Table(
        "What was cropped" + f"; the data: {data}" * seen,
        [
            Column("layer", name=True),
            Column("kernel [taps]"),
            Column("L1 gone", 1, meaning="the largest share of an output channel's L1 norm that went"),
            Column("MACs [M]", meaning="the layer's multiply-accumulates, in millions"),
            Column("worst case", 4, meaning="the largest error of its outputs, for inputs as large as the data's"),
            Column("measured", 3, meaning="the largest error on the data"),
            Column("err/RMS", 2, meaning="the RMS error on the data over the RMS of its outputs"),
            *[Column("alone [ms]", 2, meaning="the layer's fastest run, fp32, in ONNX Runtime")] * clocked,
        ],
    )
    for layer in layers:
        macs = (layer["macs_before"], layer["macs_after"])
        table.add(
            layer["name"] or ROOT,
            "{}x{} -> {}x{}".format(*layer["kernel"], *layer["kept"]),
            number(layer["l1_removed"]),
            "-" if None in macs else f"{macs[0] / 1e6:.3g} -> {macs[1] / 1e6:.3g}",
            number(layer["bound"]),
            number(layer["measured"]),
            number(layer["measured_rms"]),
            *([latency_text(layer) or "-"] if clocked else []),
        )
    return table


def latency_text(layer: dict[str, Any]) -> str:
    """A layer's milliseconds with its whole kernel and with the kept window; empty where they were not measured."""
    before, after = layer.get("latency_before_ms"), layer.get("latency_after_ms")
    return "" if before is None or after is None else f"{before:.2g} -> {after:.2g}"


def crop_summary(certificate: dict[str, Any]) -> str:
    """One sentence: how it was cropped, layers, multiply-accumulates, end-to-end error."""
    layers, asked = certificate["layers"], certificate["tolerance"]
    count = sum(layer["kernel"] != layer["kept"] for layer in layers)
    how = "lossless" if asked == "lossless" else f"tolerance {asked:g}" if asked is not None else "budget"
    if certificate["budget"] is not None:
        budget = certificate["budget"]
        several = budget.get("kind") == "top1" and budget.get("outputs", 1) > 1
        first = f" of the first of {budget['outputs']} outputs" if several else ""
        how = f"budget {budget.get('asked', '')}{first}".strip()
    parts = [f"{count} of {len(layers)} kernels cropped ({how}, {certificate['precision']})"]
    before, after, order = certificate["macs_before"], certificate["macs_after"], certificate.get("sum_order") or {}
    if before and after and count:
        parts.append(f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} M multiply-accumulates (/{before / after:.2f})")
    if not count and layers and not order.get("whole"):
        parts.append(
            "no smaller window keeps the budget"
            if asked is None
            else f"no kernel has an outer ring that is zero in {certificate['precision']}"
            if asked == "lossless"
            else "every smaller window loses more than that (kernels shrink under --sigma-penalty in training)"
        )
    if elsewhere := certificate.get("used_elsewhere"):
        parts.append(f"left whole, as the network uses their kernels outside of them: {', '.join(elsewhere)}")
    if order.get("whole"):
        parts.append(
            f"{len(order['whole'])} more kernels have zero taps and stay whole: without them the order of sums would "
            f"change an output by {order['error_of_all']:.1e} of its RMS in ONNX Runtime, the limit is "
            f"{order['limit']:.0e} (--crop 0 cuts them)"
        )
    seen = certificate["end_to_end"]
    if seen and count:
        data = certificate.get("measured_on") or f"{seen['samples']} samples"
        parts.append(
            f"over {data}, the largest output error is {seen['relative_max']:.1e} of the outputs' "
            f"RMS, the RMS error {seen['relative_rms']:.1e}"
        )
    return "; ".join(parts)
