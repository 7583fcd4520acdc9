"""ONNX Runtime's execution providers: what each is asked for, and the sessions that run on them."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gmconv.errors import UnavailableError
from gmconv.packages import install, pip

#: What a session is asked for by name, and ONNX Runtime's name for it.
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rtx": "NvTensorRTRTXExecutionProvider",
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
#: Read by TensorRT and cuBLAS when they load: 0 forbids TF32. The providers of TensorRT have no option for it.
_TF32 = "NVIDIA_TF32_OVERRIDE"
_decided: dict[str, bool] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a session runs on: `provider` of `PROVIDERS`, the CUDA ordinal, modes, and a CUstream of the caller's."""

    provider: str
    index: int = 0
    tf32: bool = False
    cuda_graph: bool = False
    stream: int | None = None
    model: str = ""
    """Names the very model: what the TensorRT providers build from it is kept under this name."""


def add_providers(ort: Any, options: Any, request: Request) -> list[tuple[str, dict[str, str]]]:
    """The `providers` of a session with `options`, which may change. Raises UnavailableError where one is missing."""
    name = PROVIDERS[request.provider]
    if request.provider == "cpu":
        return [(name, {})]
    if hasattr(ort, "preload_dlls"):  # before anything asks what there is
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    if request.provider != "cuda":
        _choose_tf32(request.tf32)
    if request.provider == "rtx" and name not in ort.get_available_providers():
        return _rtx_plugin(ort, options, request)
    require_provider(ort, name)
    chosen = [(name, _settings(request))]
    if request.provider == "tensorrt":  # for the nodes that TensorRT leaves
        chosen.append((PROVIDERS["cuda"], _settings(replace(request, provider="cuda", cuda_graph=False))))
    return chosen


def _settings(request: Request) -> dict[str, str]:
    """The provider options, in ONNX Runtime's words."""
    chosen = {"device_id": str(request.index)}
    if request.stream is not None:
        chosen |= {"user_compute_stream": str(request.stream)}
        chosen |= {"has_user_compute_stream": "1"} if request.provider != "cuda" else {}
    if request.provider == "cuda":
        chosen |= {"use_tf32": str(int(request.tf32)), "enable_cuda_graph": str(int(request.cuda_graph))}
    elif request.provider == "tensorrt":
        chosen |= {"trt_cuda_graph_enable": str(request.cuda_graph)}
        chosen |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": _cache(request)}
        chosen |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": _cache(request)}
    else:
        chosen |= {"enable_cuda_graph": str(int(request.cuda_graph)), "nv_runtime_cache_path": _cache(request)}
    return chosen


def require_provider(ort: Any, name: str) -> None:
    """Raise UnavailableError where this onnxruntime is built without a provider."""
    if name not in ort.get_available_providers():
        raise UnavailableError(
            f"this onnxruntime has no {name}; on a machine with an NVIDIA driver: {install('gpu')}; else --device cpu"
        )


def _choose_tf32(tf32: bool) -> None:
    """For TensorRT's providers, of the whole process. Raises UnavailableError where it was decided otherwise before."""
    decided = _decided.setdefault("tf32", tf32 and os.environ.get(_TF32) != "0")
    if decided != tf32:
        raise UnavailableError(
            f"TensorRT's providers use TF32 in the whole process or nowhere in it ({_TF32}): tf32={decided} holds, "
            f"use another process for tf32={tf32}"
        )
    if not tf32:
        os.environ[_TF32] = "0"


def _cache(request: Request) -> str:
    """A folder for what TensorRT builds from this very model, so that the next session does not build it again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base, "gmconv-deploy", request.provider, f"{request.model}-{'tf32' if request.tf32 else 'fp32'}")
    with contextlib.suppress(OSError):  # TensorRT goes without where it cannot be written to
        folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def _rtx_plugin(ort: Any, options: Any, request: Request) -> list[tuple[str, dict[str, str]]]:
    """Register the plug-in provider from its own wheel; the session then takes it from `options`."""
    try:
        plugin = importlib.import_module(_PLUGIN)
    except ImportError as error:
        raise UnavailableError(
            f"the TensorRT-RTX execution provider is not installed: {pip('onnxruntime-ep-nv-tensorrt-rtx-cu13')}"
        ) from error
    name = PROVIDERS["rtx"]
    try:
        ort.register_execution_provider_library(name, str(plugin.get_library_path()))
    except Exception as error:
        if "already" not in str(error):
            raise UnavailableError(f"the TensorRT-RTX execution provider does not load: {error}") from error
    # It lists devices in an order of its own; each says which CUDA ordinal it is.
    devices = {
        int(device.ep_options.get("device_id", place)): device
        for place, device in enumerate(d for d in ort.get_ep_devices() if d.ep_name == name)
    }
    if request.index not in devices:
        listed = ", ".join(f"cuda:{index}" for index in sorted(devices)) or "no GPU"
        raise UnavailableError(
            f"the TensorRT-RTX execution provider finds {listed}; cuda:{request.index} was asked for"
        )
    settings = {key: value for key, value in _settings(request).items() if key != "device_id"}
    options.add_provider_for_devices([devices[request.index]], settings)
    return []
