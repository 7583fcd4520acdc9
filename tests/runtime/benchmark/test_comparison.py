"""Several artefacts interleaved: who is divided by whom, with --twin too, and the result as JSON and as a report."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import pytest

from runtime.benchmark import comparison
from runtime.benchmark.comparison import Contender, against_first, time_artefacts
from runtime.benchmark.measure import Artefact, Prepared, parse_artefact
from runtime.benchmark.options import Options
from runtime.benchmark.timing import LoopOptions
from runtime.benchmark.twins import with_twins


def test_twin_and_report_from_the_command_line(
    digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    report = tmp_path / "report.html"
    flags = ("--twin", "--duration=0.3", "--warmUp=20", "--json", f"--report={report}")
    done = cli("runtime.benchmark", str(digits_checkpoint), str(digits_onnx), *flags)
    rows = json.loads(done.stdout)["artefacts"]
    assert [(row["artefact"], row["reference"]) for row in rows] == [
        ("torch twin (no masks)", None),
        ("torch live", "torch twin (no masks)"),
        ("torch baked", "torch twin (no masks)"),
        ("twin of digits.onnx", None),
        ("digits.onnx", "twin of digits.onnx"),
    ]
    assert all(row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"] for row in rows if row["ratio"])
    text = report.read_text()
    assert f"<title>Latency of {digits_checkpoint.name}, digits.onnx</title>" in text
    for words in ("Effective receptive field", "torch live", "Masks", "layer3.0.conv2", "twin of digits.onnx"):
        assert words in text


def test_artefacts_of_one_name_are_numbered() -> None:
    names = [c.artefact.name for c in against_first([Artefact(Path(p)) for p in ("a/m.onnx", "b/m.onnx", "c.onnx")])]
    assert names == ["m.onnx #1", "m.onnx #2", "c.onnx"]


def test_every_contender_on_the_live_networks_clock_is_also_divided_by_it(
    small_checkpoint: Path, tmp_path: Path
) -> None:
    options = Options(loop=LoopOptions(warm_up=0, duration=0.05, iterations=10))
    contenders = with_twins([Artefact(small_checkpoint)], tmp_path)
    with ExitStack() as stack:
        prepared = [stack.enter_context(Prepared(c.artefact, options)) for c in contenders]
        found = comparison.compare(contenders, prepared, options, None)
        twin, live, baked = found.rows
        assert live.over_live is None
        assert twin.over_live == found.interleaved.ratio(0, 1)
        assert baked.over_live == found.interleaved.ratio(2, 1)
        assert found.to_dict()["artefacts"][0]["over_live"]["value"] == twin.over_live.value
        prepared[0].lane.clock = "another"
        assert comparison.compare(contenders, prepared, options, None).rows[0].over_live is None


def test_what_has_no_twin_is_timed_and_says_why(small_checkpoint: Path) -> None:
    options = Options(loop=LoopOptions(warm_up=0, duration=0.05, iterations=10))
    contenders = [Contender(Artefact(small_checkpoint, label=name), index) for index, name in enumerate("ab")]
    contenders[1] = Contender(contenders[1].artefact, 1, no_twin="nobody knows")
    with ExitStack() as stack:
        prepared = [stack.enter_context(Prepared(c.artefact, options)) for c in contenders]
        found = comparison.compare(contenders, prepared, options, None)
    assert found.warnings[0] == "no twin of b: nobody knows"
    row, reference = found.to_dict()["artefacts"][::-1]
    assert (row["reference"], row["ratio"], row["no_twin"]) == (None, None, "nobody knows")
    assert row["latency_ms"]["median"] > 0
    assert "no_twin" not in reference
    assert [[cell.plain for cell in cells[4:6]] for cells in found.table().rows] == [
        ["1 (reference)", ""],
        ["-", "no twin"],
    ]


def test_each_artefact_may_have_its_own_graph_mode(small_checkpoint: Path) -> None:
    options = Options(cuda_graph=True)
    with Prepared(parse_artefact(f"{small_checkpoint}@cuda_graph=false"), options) as prepared:
        assert prepared.cuda_graph is False
    with pytest.raises(click.UsageError, match="cuda_graph is true or false"):
        Prepared(parse_artefact(f"{small_checkpoint}@cuda_graph=often"), options)


def test_ratios_of_two_networks_are_told(digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.pt"
    again.write_bytes(digits_checkpoint.read_bytes() + b"trained for longer")
    said = "digits.onnx was made from digits.pt ("
    for checkpoint, told in ((again, [True]), (digits_checkpoint, [])):
        for files in ([checkpoint, digits_onnx], [digits_onnx, checkpoint]):
            done = time_artefacts(files, warm_up=0, duration=0, iterations=2)
            found = [text for text in done.warnings if "not from this checkpoint" in text]
            assert [text.startswith(said) for text in found] == told
