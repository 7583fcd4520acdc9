"""checkpoint -> bake -> (crop) -> ONNX -> (other precisions), proven before anything appears under its name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.onnx.interface import examples, input_names, output_specs
from export.onnx.options import ASKED, ExportOptions, Note, nothing_lowered
from export.onnx.refusals import (
    advice_on_parity,
    all_or_none,
    doubts,
    last_words,
    refuse_early,
    refuse_precisions,
    refuse_saying_less,
    refuse_two_answers,
    refuse_two_kernels,
    refuse_unfit_images,
    require_libraries,
)
from gmconv.asking import silent
from gmconv.errors import ParityError, RefusedError, layer_words

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import nn

    from export.graph.capture import Exported as Captured
    from export.onnx.cases import Case
    from export.onnx.proof import Proof
    from export.onnx.reference import Outputs, Reference
    from export.onnx.trained import FromFile, InMemory, Live
    from gmconv import Checkpoint
    from gmconv.cropping.certificate import CropCertificate
    from runtime.manifest import FileDigest, Manifest
    from runtime.records import AxisRange, Crop

IN_MEMORY = "the network in memory"
_EXTERNAL_ABOVE = 2**31 - 2**20  # protobuf cannot hold 2 GiB; the graph itself needs a little


@dataclass(slots=True)
class _Exported:
    """The graph as written, and what of the network is still needed once its memory is free.

    `first`: what the network returned for the first case before anything was done to it.
    """

    file: Path
    facts: Checkpoint
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    operators: dict[str, int]
    baked_sha256: dict[str, str]
    first: list[Outputs]
    fused: list[Outputs] | None
    crop: CropCertificate | None
    cropped: list[Outputs] | None
    ranges: dict[str, AxisRange]

    @property
    def classifies(self) -> bool:
        return any(len(spec.shape) == 2 for spec in self.outputs)


@ASKED.of
def export_onnx(
    source: str | Path | Live,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    note: Note | None = None,
    **choices: Any,
) -> Manifest:
    """Export a checkpoint, or a network in memory, to `output` and prove the result.

    Args:
        source: `.pt`, `.pth` or `.safetensors`, ours or foreign; or a `Live` network.
        output: the `.onnx` file; its manifest is written beside it. Nothing appears under any name on failure.
        options: see `ExportOptions`.
        choices: or those flat, as on the command line: precision="fp16,int8", data="images/", crop="1e-3", batch,
            keep_fp32, ...; and for a foreign checkpoint arch, input_shape, labels, preprocessing, mean, std, weights.
        note: called with a few words when a step begins.

    Returns:
        The manifest of the first file that `options.outputs` names.

    Raises:
        RefusedError: the output cannot be written, or the network cannot be exported like this.
        gmconv.errors.CheckpointError, BakeError: the checkpoint was refused.
        ParityError: ONNX Runtime does not compute what the network as trained computes.
    """
    from gmconv.files import staged
    from runtime.manifest import read_manifest

    options, output, note = ASKED(options, choices), Path(output), note or silent
    written = options.outputs(output)
    refuse_early(source, written, options)
    if idle := nothing_lowered(options):
        raise RefusedError(idle)
    from export.onnx.trained import Live

    with staged(written[0]) as folder, _opened(source, options, note) as trained:
        from export.onnx.cases import comparison_cases  # which load torch; the reference's process is to begin first
        from export.onnx.proof import run_any
        from export.onnx.reference import work_on

        loaded = trained.loaded
        given = source.foreign if isinstance(source, Live) else options.foreign
        returned, said = output_specs(loaded, options, given, in_memory=not trained.chain)
        refuse_unfit_images(loaded, options)
        refuse_saying_less(loaded, given, trained.chain, written, options)
        refuse_precisions(loaded, options)
        names = [spec.name for spec in returned]
        cases = comparison_cases(loaded, options, examples=trained.examples, outputs=returned, note=note)
        work = work_on(cases, names, options)
        trained.start(work, beside=not options.crops)  # a crop times layers, which wants all cores
        name = output.name if "fp32" in options.precisions else f".fp32.{output.name}"
        exported = _write_fp32(loaded, names, cases, folder / name, options, note, said)
        del loaded  # ONNX Runtime is about to need as much memory again
        note("running ONNX Runtime and comparing")
        with ThreadPoolExecutor(1) as beside_it:
            files = beside_it.submit(_check_and_digest, exported.file)
            shipped = run_any(exported.file, cases)  # before the reference is waited for, and known
            proof = _prove(exported, cases, trained.result(note), shipped, note)
            manifest = _manifest(trained.chain, exported, proof, options, files.result())
        _write_variants(exported, manifest, proof, output, options, note)
    return read_manifest(written[0], verify=False)


def _opened(source: str | Path | Live, options: ExportOptions, note: Note) -> FromFile | InMemory:
    from export.onnx.trained import FromFile, InMemory, Live

    if not isinstance(source, Live):
        return FromFile(Path(source), options, note)
    require_libraries(options)
    return InMemory(source)


def _write_fp32(
    loaded: Checkpoint,
    names: list[str],
    cases: list[Case],
    file: Path,
    options: ExportOptions,
    note: Note,
    said: list[str],
) -> _Exported:
    """`said`: notes so far."""
    from export.graph import capture
    from export.graph.kernels import require_stored_kernels
    from export.onnx.changes import crop_kernels, merge_branches, what_was_merged
    from export.onnx.reference import run_torch
    from gmconv.constants import bake_for_inputs
    from gmconv.surgery import copied

    first = run_torch(loaded.model, loaded.inputs, cases[:1], names)
    live = copied(loaded.model) if options.fuse else loaded.model  # baking works in place
    note("baking masks and other constant kernels")
    model, certificate = bake_for_inputs(loaded.model, loaded.inputs, **options.bake_options)
    baked = certificate.sha256()
    kept = {kernel.name: kernel.reason for kernel in certificate.kernels if kernel.kind == "kept"}
    model, merged = merge_branches(model, live, loaded.inputs, options)
    fused = run_torch(model, loaded.inputs, cases, names) if merged else None
    model, crop = crop_kernels(model, loaded, options, note)
    cropped = run_torch(model, loaded.inputs, cases, names) if crop and crop.cropped else None
    note("exporting to ONNX")
    written = _to_onnx(model, loaded, names, file, options, note)
    exported = written.model
    require_stored_kernels(written.program, kept)
    notes = [*said, *[what_was_merged(merged)] * options.fuse]
    notes += [f"{layer_words(name)} is exported as it is: {reason}" for name, reason in kept.items()]
    unused = capture.unused_layers(written, model, baked)
    if unused:
        notes.append(f"not in the graph, as no output needs them: {', '.join(unused)}")
    if idle := capture.idle_inputs(exported):
        notes.append(f"no output depends on these inputs: {', '.join(idle)}")
    for text in notes:
        note(text)
    inputs, outputs = capture.specs(exported)
    operators = capture.operator_histogram(exported)
    _save(exported, file, options)
    for value in exported.graph.initializers.values():
        value.const_value = None  # onnxscript's rewrite rules are globals that keep the last graph they saw
    import torch

    facts = replace(loaded, model=torch.nn.Identity(), notes=(*loaded.notes, *notes))
    return _Exported(file, facts, inputs, outputs, operators, baked, first, fused, crop, cropped, written.ranges)


def _to_onnx(
    model: nn.Module, loaded: Checkpoint, names: list[str], file: Path, options: ExportOptions, note: Note
) -> Captured:
    """The captured graph; what the exporter printed meanwhile is noted, its end once more where it refused."""
    from export.graph import capture

    log, refused = file.with_name("exporter.log"), False
    try:
        return capture.to_onnx(
            model,
            dict(zip(input_names(loaded, options), examples(loaded, options), strict=True)),
            output_names=names,
            axes=capture.Axes(batch=options.batch is None, hw=options.dynamic_hw),
            opset=options.opset,
            log=log,
        )
    except RefusedError:
        refused = True
        raise
    finally:
        chatter = log.read_text(errors="replace").strip() if log.exists() else ""
        if chatter:
            note(f"[exporter] {chatter}")
        if refused and (end := last_words(chatter)):
            note(end)
        log.unlink(missing_ok=True)


def _save(exported: ir.Model, file: Path, options: ExportOptions) -> None:
    import onnx_ir

    from export.graph import capture

    size = sum(v.const_value.nbytes for v in exported.graph.initializers.values() if v.const_value is not None)
    external = file.name + ".data" if options.external_data or size > _EXTERNAL_ABOVE else None
    onnx_ir.save(exported, file, external_data=external)
    if options.simplify:
        capture.simplify(file)


def _check_and_digest(file: Path) -> tuple[FileDigest, ...]:
    """The graph file and its external data, if any, after `onnx.checker` took them."""
    import onnx

    from runtime.manifest import digest_onnx

    onnx.checker.check_model(str(file))
    return digest_onnx(file)


def _prove(
    exported: _Exported, cases: list[Case], reference: Reference, shipped: list[Outputs] | None, note: Note
) -> Proof:
    from export.onnx.cases import taken
    from export.onnx.proof import Proof, run_onnx
    from runtime.parity.tolerances import crop_cost
    from runtime.records import Crop

    for here, there in zip(exported.first, reference.live, strict=False):
        refuse_two_answers(here, there)
    refuse_two_kernels(exported.baked_sha256, reference.certificate.sha256())
    found = shipped or [{} for _ in cases]
    proof = Proof(cases, reference, found, exported.classifies, exported.fused, exported.cropped)
    inputs, ranges = exported.inputs, exported.ranges
    proof = proof.where([taken(c, o, inputs, ranges, note) for c, o in zip(cases, reference.live, strict=True)])
    if shipped is None:
        proof = replace(proof, shipped=run_onnx(exported.file, proof.cases))
    if exported.crop is None:
        return proof
    crop = crop_record(exported.crop) or Crop()
    return replace(
        proof,
        crop_cost=crop_cost(crop),
        crop_precision=exported.crop.precision,
        lossy=not crop.removes_only_zeros,
        crop_on_data=crop.spent_on_data,
    )


def crop_record(certificate: CropCertificate | None) -> Crop | None:
    """What the manifest keeps of a crop."""
    import msgspec

    from runtime.records import Crop

    return None if certificate is None else msgspec.convert(certificate.to_dict(), Crop)


def _manifest(
    chain: tuple[FileDigest, ...],
    exported: _Exported,
    proof: Proof,
    options: ExportOptions,
    files: tuple[FileDigest, ...],
) -> Manifest:
    """Judge the fp32 file and describe it. Raises ParityError when it does not hold."""
    from gmconv.packages import versions
    from gmconv.preprocessing import read_preprocessing
    from runtime.manifest import Manifest, digest, sidecar, utc_now
    from runtime.metadata import refuse_untrue
    from runtime.records import Export

    facts, file, baked = exported.facts, exported.file, proof.reference.certificate
    golden = None if options.golden is None else digest(options.golden, "golden")
    confirmed, assumed = options.confirmed(facts.warnings)
    verdict = proof.judge("fp32")
    if not verdict.passed:
        raise ParityError(f"{file.name.removeprefix('.fp32.')}: not written, parity failed: {verdict.summary()}")
    manifest = Manifest(
        artefact=files[0],
        external=files[1:],
        inputs=exported.inputs,
        outputs=exported.outputs,
        ranges=exported.ranges,
        created=utc_now(),
        chain=chain,
        preprocessing=read_preprocessing(facts.preprocessing),
        labels=facts.labels,
        dataset=facts.dataset,
        arch=facts.arch,
        precision_found={"fp32": exported.operators.get("Conv", 0) + exported.operators.get("Gemm", 0)},
        certificate=baked.to_dict(),
        crop=crop_record(exported.crop),
        parity=verdict.record(chain[0].file if chain else IN_MEMORY, "onnxruntime cpu"),
        golden=golden,
        export=Export(
            opset=options.opset,
            batch=options.batch or "dynamic",
            dynamic_hw=options.dynamic_hw,
            shapes={spec.name: one.shape for spec, one in zip(exported.inputs, facts.inputs, strict=True)},
            simplify=options.simplify,
            fuse=options.fuse,
            operators=exported.operators,
            rows_meet=proof.reference.apart > 0,
            notes=(*confirmed, *facts.notes, *proof.reference.notes),
            warnings=(*assumed, *doubts(bool(baked.layers or baked.kernels), proof.reference.apart, exported.crop)),
        ),
        versions=versions("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "gmconv-deploy"),
    )
    refuse_untrue(manifest)
    sidecar(file).write_text(manifest.to_json())
    return manifest


def _write_variants(
    exported: _Exported, manifest: Manifest, proof: Proof, output: Path, options: ExportOptions, note: Note
) -> None:
    """The other precisions, each judged against the live network by the tolerance of its precision."""
    if options.precisions == ("fp32",):
        return
    import onnx

    from export.graph.check import save_graph
    from export.onnx.proof import run_onnx
    from export.precision.converter import PrecisionConverter, with_precision
    from runtime.artefact import facts_of
    from runtime.manifest import sidecar

    folder, settings = exported.file.parent, options.calibrated
    names = [spec.name for spec in exported.inputs]
    converter = PrecisionConverter(
        onnx.load(exported.file),
        settings,
        facts=facts_of(manifest),
        samples=[dict(zip(names, case.feeds.values(), strict=True)) for case in proof.cases if not case.noise],
    )
    for precision, final in zip(options.precisions, options.outputs(output), strict=True):
        name = final.name
        if precision == "fp32":
            continue
        note(f"converting to {precision} and comparing")
        with all_or_none(precision, options):
            graph, audit = converter.convert(precision)
        chain = (*manifest.chain, replace(manifest.artefact, file=manifest.artefact.file.removeprefix(".fp32.")))
        described = replace(with_precision(manifest, graph, audit), chain=chain)
        written = save_graph(graph, folder / name, described, external=bool(manifest.external))
        checked = proof.on_images() if precision in ("int8", "fp8") else proof
        outputs = run_onnx(folder / name, checked.cases)
        verdict = replace(checked, shipped=outputs).judge_file(precision, folder / name)
        if not verdict.passed:
            said = f"nothing was written, parity failed: {verdict.summary()}"
            raise ParityError(f"{name}: {said}; {converter.doubts(precision)}{advice_on_parity(precision, options)}")
        sidecar(folder / name).write_text(
            replace(
                written,
                parity=verdict.record(manifest.chain[0].file if manifest.chain else IN_MEMORY, "onnxruntime cpu"),
            ).to_json()
        )
    if "fp32" not in options.precisions:
        for file in folder.glob(f"{exported.file.name}*"):
            file.unlink()
