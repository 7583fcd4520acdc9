"""Step g: other people's engines on the card: ONNX Runtime's CUDA provider, and Torch-TensorRT-RTX as the anchor."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

import gmconv
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.runners import open_runner
from tests.gpu.proof import artefacts
from tests.gpu.proof.engines import judged
from tests.gpu.proof.parity import relative
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context


def run(context: Context, recorder: Recorder) -> None:
    """Rows of flavor "onnxruntime", then the anchor."""
    precisions = ("fp32",) if context.rehearse else ("fp32", "tf32", "fp16", "int8")
    for precision in precisions:
        with recorder.check("parity with live on the CPU", flavor="onnxruntime", precision=precision) as figures:
            recorder.need(4)
            figures["detail"] = parity(context, precision, figures)
    with recorder.check("modes agree on new inputs and shapes", flavor="onnxruntime", precision="fp32") as f:
        recorder.need(4)
        f["detail"] = modes(context)
    with recorder.check("Torch-TensorRT-RTX as the anchor") as figures:
        recorder.need(20)
        figures["detail"] = anchor(context)


def device(context: Context) -> str:
    """The GPU, where this ONNX Runtime has a provider for it. Raises ImportError where it has none."""
    import onnxruntime

    if context.rehearse:
        return "cpu"
    found = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" not in found:
        raise ImportError(f"this ONNX Runtime ({onnxruntime.__version__}) has no CUDA provider: {', '.join(found)}")
    return "cuda:0"


def parity(context: Context, precision: str, figures: dict[str, Any]) -> str:
    """The project's own comparison."""
    asked = "tf32" if precision == "tf32" else None
    samples = 4 if context.rehearse else 64
    options = ParityOptions(device=device(context), precision=asked, samples=samples, yardstick=not context.rehearse)
    return judged(
        compare_artefacts(artefacts.checkpoint(context), [artefacts.onnx_file(context, precision)], options), figures
    )


def modes(context: Context) -> str:
    """Plain and as a CUDA graph, alternating shapes, against the CPU."""
    where = device(context)
    options: list[dict[str, Any]] = [{}] if context.rehearse else [{}, {"cuda_graph": True}]
    source = artefacts.onnx_file(context)
    for given in options:
        with open_runner(source) as cpu, open_runner(source, where, **given) as gpu:
            size = tuple(int(d) for d in cpu.inputs[0].shape[1:])
            for batch, seed in ((1, 0), (8, 1), (1, 2), (8, 3)):
                images = np.random.default_rng(seed).standard_normal((batch, *size), dtype=np.float32)
                want, found = (torch.from_numpy(r.run({"input": images})["logits"]) for r in (cpu, gpu))
                require(relative(found, want) <= 2e-5, f"{given}: batch {batch}: RMS {relative(found, want):.1e}")
    return f"{len(options)} modes"


def anchor(context: Context) -> str:
    """The baked network through NVIDIA's own compiler for torch: an engine that this project did not build."""
    images = torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    live = gmconv.load_checkpoint(artefacts.checkpoint(context)).model
    images = images[..., : 16 if context.rehearse else 32, : 16 if context.rehearse else 32].contiguous()
    with torch.inference_mode():
        expected = live(images)
    baked = gmconv.bake(live).to(context.device)
    if context.rehearse:
        compiled: Any = baked
    else:
        torch_tensorrt = importlib.import_module("torch_tensorrt")  # the wheel of torch_tensorrt_rtx brings this module
        compiled = torch_tensorrt.compile(baked, ir="dynamo", arg_inputs=[images.to(context.device)], min_block_size=1)
    with torch.no_grad():
        found = compiled(images.to(context.device)).cpu()
    error = relative(found, expected)
    require(error <= 2e-5, f"RMS {error:.1e} against the live network")
    return f"RMS {error:.1e} against the live network"
