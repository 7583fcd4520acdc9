"""`make bench-verdict`: plant errors into exported artefacts and count how many `runtime.parity` refuses.

For every network of `verdict_networks` and every precision: the clean artefact must pass, and a copy with one error of
`verdict_errors` must fail. An error counts as *planted* when it matters: on pictures and noise that the verdict does
not see, some value of some output moves by more than the precision's own noise, the largest difference between the
clean artefact and the live network there (of whole numbers and booleans: more of them change than differ there). A
class that the live network decides by more than that noise cannot change without it.

    python -m tests.bench.verdict --results counts.jsonl       # all; what the file already holds is not run again
    python -m tests.bench.verdict --networks unet,offset --precisions fp16
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as item
from pathlib import Path

import click
import numpy as np
import onnx

from export.graph.check import save_graph
from export.onnx.pipeline import ExportOptions, export_onnx
from export.precision.convert import convert_precision
from export.precision.converter import PrecisionOptions
from gmconv.data import load_samples
from gmconv.errors import RefusedError
from gmconv.foreign import Foreign
from runtime.manifest import read_manifest
from runtime.parity.run import ParityOptions, ParityReport, compare_artefacts
from runtime.runners import open_runner
from runtime.runners.base import Array
from tests.bench.verdict_errors import ERRORS, Planted, plant
from tests.bench.verdict_networks import NETWORKS, SIZE, Entry, numbers, pictures, save

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8 cpu", "fp8")
GOALS = {"int8": 0.95, "int8 cpu": 0.95, "fp8": 0.95}
SAMPLES = 32
AT_ONCE = 6  # wrong files that lie on the disk together
Outputs = list[dict[str, Array]]


@dataclass(slots=True)
class Count:
    """What became of the errors planted into the artefacts of one precision."""

    planted: int = 0
    caught: int = 0
    harmless: int = 0
    clean: int = 0
    refused: int = 0
    missed: list[str] = item(default_factory=list)

    def __add__(self, other: Count) -> Count:
        names = ("planted", "caught", "harmless", "clean", "refused", "missed")
        return Count(*(getattr(self, name) + getattr(other, name) for name in names))

    def cells(self) -> str:
        """As cells of a table."""
        share = f"{100 * self.caught / self.planted:.1f} %" if self.planted else "-"
        return f"{self.caught} / {self.planted} | {share} | {self.harmless} | {self.refused} / {self.clean}"


#: By network, precision and kind of error; "" for the clean artefact.
Counts = dict[tuple[str, str, str], Count]


@dataclass(frozen=True, slots=True)
class Subject:
    """A network of the bench: its checkpoint, what parity is asked, and the inputs it never sees."""

    name: str
    entry: Entry
    checkpoint: Path
    options: ParityOptions
    fresh: Outputs

    def judge(self, files: Sequence[Path]) -> ParityReport:
        """What `python -m runtime.parity` says of them."""
        return compare_artefacts(self.checkpoint, files, self.options)

    def run(self, file: Path, precision: str) -> Outputs:
        """The outputs of a file on fresh inputs; noise is left out where ranges were calibrated."""
        calibrated = precision.startswith(("int8", "fp8"))
        extra = {"foreign": self.options.foreign} if file == self.checkpoint else {}
        with open_runner(file, **extra) as runner:
            names = [spec.name for spec in runner.inputs]
            return [
                runner.run(dict(zip(names, feeds.values(), strict=True)))
                for feeds in (self.fresh[:-1] if calibrated else self.fresh)
            ]


def subject(name: str, folder: Path) -> Subject:
    """Make a network of the bench; the samples to calibrate and to compare on lie beside it."""
    entry, checkpoint = NETWORKS[name], save(name, folder)
    inputs = (("image", (3, SIZE, SIZE), "float32"), ("numbers", (4,), "float32")) if entry.numbers else None
    foreign = Foreign(inputs=inputs) if entry.digits else Foreign(arch=entry.arch, inputs=inputs)
    images = None if entry.digits else folder / "samples.npz"
    fresh = [{"image": pictures(16, seed=5)}, {"image": pictures(16, seed=6)}]
    if entry.digits:
        held_out = load_samples("digits", input_shape=(3, SIZE, SIZE), limit=32, seed=5)
        fresh = [{"image": batch.images} for batch in held_out.batches(16)]
    fresh.append({"image": np.random.default_rng(8).standard_normal((16, 3, SIZE, SIZE), dtype=np.float32)})
    if entry.numbers:
        fresh = [{**feeds, "numbers": numbers(16, seed)} for seed, feeds in enumerate(fresh)]
    options = ParityOptions(images=images, samples=SAMPLES, foreign=foreign)
    return Subject(name, entry, checkpoint, options, fresh)


def artefacts(found: Subject, precisions: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The exported files, one precision after another; what cannot be exported is said on stderr."""
    source = found.checkpoint.with_name("net.onnx")
    export_onnx(found.checkpoint, source, ExportOptions(foreign=found.options.foreign, images=found.options.images))
    for precision in precisions:
        if precision == "fp32":
            yield precision, source
            continue
        kind, _, target = precision.partition(" ")
        calibration = "digits" if found.entry.digits else found.checkpoint.with_name("samples.npz")
        options = PrecisionOptions(calibration=calibration, calibration_images=64, target=target or "tensorrt")
        path = source.with_name(f"net.{precision.replace(' ', '-')}.onnx")
        try:
            convert_precision(source, path, kind, options, verify=False)
        except RefusedError as error:
            print(f"{found.name}, {precision}: not exported ({error.message})", file=sys.stderr)
            continue
        yield precision, path


def moved(live: Outputs, clean: Outputs, wrong: Outputs) -> bool:
    """Whether an error matters; see the top of this file."""
    for name in live[0]:
        a, b, c = (np.concatenate([feeds[name] for feeds in side]) for side in (live, clean, wrong))
        if a.dtype.kind in "iub":
            if b.shape != c.shape or (b != c).mean() > (a != b).mean():
                return True
            continue
        noise = np.abs(b.astype(np.float64) - a).max()
        if b.shape != c.shape or not np.abs(c.astype(np.float64) - b).max() <= noise:  # NaN moves
            return True
    return False


def _named(outputs: Outputs, names: Mapping[str, object]) -> Outputs:
    """Outputs of a checkpoint under the names of the file."""
    return [dict(zip(names, feeds.values(), strict=True)) for feeds in outputs]


def measure(found: Subject, precision: str, file: Path) -> dict[str, Count]:
    """Plant every kind of error into one artefact, judge, and count by kind; "" has what the clean one came to."""
    clean = found.run(file, precision)
    live = _named(found.run(found.checkpoint, precision), clean[0])
    manifest, counts = read_manifest(file), {kind: Count() for kind in ("", *ERRORS)}
    said = found.judge([file]).candidates[0]
    counts[""].clean = 1
    if not said.passed:
        counts[""].refused = 1
        counts[""].missed.append(f"{found.name}, {precision}, clean: refused: {said.failures()[0]}")
    waiting: list[tuple[Path, Planted]] = []
    for index, planted in enumerate(plant(onnx.load(file), found.entry.places)):
        wrong = file.with_name(f"wrong{index}.onnx")
        save_graph(planted.model, wrong, manifest)
        if moved(live, clean, found.run(wrong, precision)):
            waiting.append((wrong, planted))
        else:
            counts[planted.kind].harmless += 1
            wrong.unlink()
        if len(waiting) == AT_ONCE:
            _judge(found, precision, waiting, counts)
    _judge(found, precision, waiting, counts)
    return counts


def _judge(found: Subject, precision: str, waiting: list[tuple[Path, Planted]], counts: Mapping[str, Count]) -> None:
    """Judge wrong files, count what was said of them, and delete them."""
    said = found.judge([file for file, _ in waiting]).candidates if waiting else ()
    for (file, planted), candidate in zip(waiting, said, strict=True):
        count = counts[planted.kind]
        count.planted += 1
        count.caught += not candidate.passed
        if candidate.passed:
            worst = max(hop.outputs[0].rel_rms or 0 for hop in candidate.verdict.hops)
            count.missed.append(f"{found.name}, {precision}: {planted.what} (relative RMS error {worst:.2g})")
        file.unlink()
    waiting.clear()


def table(title: str, rows: Mapping[str, Count]) -> list[str]:
    """As Markdown."""
    head = f"| {title} | caught / planted | share | within the noise | clean refused |"
    return [head, "|---|---|---|---|---|", *(f"| {name} | {count.cells()} |" for name, count in rows.items())]


def added(counts: Mapping[tuple[str, str, str], Count], part: int, names: Sequence[str]) -> dict[str, Count]:
    """Counts by one part of their key."""
    return {
        name: sum((count for key, count in counts.items() if key[part] == name), Count())
        for name in names
        if any(key[part] == name for key in counts)
    }


def recorded(results: Path | None) -> Counts:
    """What earlier runs wrote, by network, precision and kind of error."""
    if results is None or not results.exists():
        return {}
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {tuple(line["of"]): Count(**line["count"]) for line in lines}


def run(name: str, precisions: Sequence[str]) -> Iterator[Counts]:
    """Plant into the artefacts of one network; the counts of one precision after another."""
    with tempfile.TemporaryDirectory() as folder:
        found = subject(name, Path(folder))
        for precision, file in artefacts(found, precisions):
            yield {(name, precision, kind): c for kind, c in measure(found, precision, file).items()}


@click.command()
@click.option("--networks", default=",".join(NETWORKS), show_default=True)
@click.option("--precisions", default=",".join(PRECISIONS), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), help="Keep counts here; what it holds is not run again.")
@click.option("--show", is_flag=True, help="Run nothing: print what --results holds.")
def main(networks: str, precisions: str, results: Path | None, show: bool) -> None:
    """Print the tables as Markdown, and below them what was missed."""
    counts = recorded(results)
    for name in () if show else networks.split(","):
        left = [p for p in precisions.split(",") if (name, p, "") not in counts]
        began = time.perf_counter()
        for found in run(name, left) if left else ():
            counts |= found
            if results is not None:
                lines = (json.dumps({"of": key, "count": asdict(count)}) + "\n" for key, count in found.items())
                with results.open("a") as file:
                    file.writelines(lines)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    by_precision = added(counts, 1, PRECISIONS)
    for title, part, names in (("precision", 1, PRECISIONS), ("network", 0, [*NETWORKS]), ("error", 2, [*ERRORS])):
        print("\n".join([f"By {title}:", *table(title, added(counts, part, names))]))
    short = [n for n, c in by_precision.items() if c.refused or c.caught < GOALS.get(n, 1.0) * c.planted]
    print(
        f"Goals (fp32, fp16, bf16 100 %; 8 bits 95 %; no clean artefact refused): {', '.join(short) or 'none'} missed."
    )
    missing = {n: [p for p in PRECISIONS if (n, p, "") not in counts] for n in NETWORKS}
    print("Not run: " + ("; ".join(f"{n} in {', '.join(left)}" for n, left in missing.items() if left) or "nothing"))
    print("\n".join(["Planted and passed:", *(text for count in counts.values() for text in count.missed)]))


if __name__ == "__main__":
    main()
