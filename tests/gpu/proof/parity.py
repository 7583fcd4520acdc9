"""Step b: the trained network in torch on the card: the reference of every other comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import gmconv
from gmconv.mask import gaussian_mask
from runtime.parity.tolerances import TOLERANCES
from tests.gpu.proof.networks import Network, large_kernels, zoo
from tests.gpu.proof.rows import Recorder, require
from tests.gpu.proof.steps import Context

KERNELS = (1, 2, 3, 5, 7, 13, 31, (3, 7), (31, 5))
SIGMAS = (0.0, 1e-3, 0.1, 0.3, 0.5, 0.7071, 1.0, 1.5, 3.1416, 5.0, 17.0, 1e6)
BATCHES = (1, 8, 32)


def run(context: Context, recorder: Recorder) -> None:
    """Rows of flavor "torch"."""
    device = context.device
    with recorder.check("masks computed on GPU and CPU, bit for bit") as figures:
        figures["detail"] = masks(device)
    networks = [zoo("resnet20", 32), zoo("mobilenet_v2", 96), large_kernels(64), zoo("resnet50", 224)]
    batches = BATCHES
    if context.rehearse:
        networks, batches = [zoo("resnet20", 8)], (1, 2)
    for network in networks:
        live = network.live().to(device)
        baked = gmconv.bake(live)
        for precision in ("fp32", "tf32", "bf16", "fp16"):
            what = f"live = baked bitwise, {network.name}"
            with recorder.check(what, flavor="torch", precision=precision) as figures:
                recorder.need(2)
                figures["detail"] = bitwise(network, live, baked, batches, precision, device)
        with recorder.check(f"the float64 yardstick, {network.name}", flavor="torch", precision="fp32") as f:
            recorder.need(2)
            f["detail"] = yardstick(network, live, batches[-1], "fp32", device, f)
        with recorder.check(f"TF32 against float64, {network.name}", flavor="torch", precision="tf32") as f:
            recorder.need(2)
            f["detail"] = yardstick(network, live, batches[-1], "tf32", device, f)
        del live, baked


def masks(device: str) -> str:
    """Every kernel size with every sigma, one per channel too, in the three dtypes. Raises AssertionError."""
    compared = 0
    for kernel in KERNELS:
        for dtype in (torch.float64, torch.float32, torch.float16):
            for sigma in (*(torch.tensor([s]) for s in SIGMAS), torch.linspace(0.05, 8, 257)):
                here = gaussian_mask(kernel, sigma, dtype=dtype)
                there = gaussian_mask(kernel, sigma.to(device), dtype=dtype).cpu()
                differ = int((here != there).sum())
                # float64 itself is one rounding of exp, which no library promises; what is baked is float32 or less.
                limit = here.numel() if dtype == torch.float64 else 0
                worst = float((here.double() - there.double()).abs().max())
                require(
                    differ <= limit and worst <= 2.3e-16,
                    f"{kernel}, {dtype}, sigma {sigma[:3].tolist()}: {differ} taps differ by up to {worst:.1e}",
                )
                compared += here.numel()
    return f"{compared:,} taps"


@contextlib.contextmanager
def mode(precision: str, device: str) -> Iterator[None]:
    """fp32, tf32 (torch's switches), or bf16 and fp16 by autocast."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.partition(":")[0], kinds.get(precision, torch.bfloat16), enabled=precision in kinds),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def bitwise(
    network: Network, live: nn.Module, baked: nn.Module, batches: tuple[int, ...], precision: str, device: str
) -> str:
    """Live and baked, three times at each batch. Raises AssertionError where one bit differs."""
    with mode(precision, device):
        for batch in batches:
            images = network.images(batch, seed=batch).to(device)
            first = live(images)
            require(bool(torch.isfinite(first).all()), f"batch {batch}: outputs are not finite")
            for turn in range(3):
                found = baked(images) if turn != 1 else live(images)
                differ = int((found != first).sum())
                worst = relative(found, first)
                require(not differ, f"batch {batch}, turn {turn}: {differ} of {first.numel()} differ, RMS {worst:.1e}")
    return f"batch {', '.join(map(str, batches))}"


def yardstick(
    network: Network, live: nn.Module, batch: int, precision: str, device: str, figures: dict[str, object]
) -> str:
    """Live on the card, live on the CPU and live in float64 on the card. Raises AssertionError outside the table."""
    images = network.images(batch, seed=7)
    with torch.inference_mode():
        exact = network.live().double().to(device)(images.double().to(device)).cpu()
        on_cpu = network.live()(images).double()
    with mode(precision, device):
        on_card = live(images.to(device)).double().cpu()
    figures |= {
        "card_to_float64": relative(on_card, exact),
        "cpu_to_float64": relative(on_cpu, exact),
        "card_to_cpu": relative(on_card, on_cpu),
    }
    limit = TOLERANCES[precision].rel_rms
    for name in ("card_to_float64", "card_to_cpu"):
        require(figures[name] <= limit, f"{name} {figures[name]:.2e}, the table allows {limit:.0e}")  # type: ignore[operator]
    return (
        "card - float64 {card_to_float64:.1e}, CPU - float64 {cpu_to_float64:.1e}, card - CPU {card_to_cpu:.1e}".format(
            **figures
        )
    )


def relative(found: Tensor, expected: Tensor) -> float:
    """RMS of the error over the RMS of `expected`."""
    wide = expected.double()
    return float((found.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-300))
