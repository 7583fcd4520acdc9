"""Reading back what TensorRT built, from its log and from its inspector."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from export.tensorrt.build import refuse_other_precision
from export.tensorrt.layers import count_fusions, layers_of_inspector, layers_of_log, precision_histogram, read_layers
from gmconv.errors import BuildError

# TensorRT-RTX 1.7.1, VERBOSE log of an fp16 build, shortened.
LOG = """Layers:
Name: __mye349_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: __myl_Move_myl0_1, LayerType: kgen, Inputs: [ { Name: input, Dimensions: [-1,3,32,32], Strides: [3072,1024,32,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: x, Dimensions: [-1,4,32,32], Strides: [1], StrideOrder: [3], Datatype: Half, Format: (NHWC) Channel major format }], TacticName: __myl_Move_0xf7, StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: relu1]
Name: conv1_myl0_2, LayerType: correlation, Inputs: [ { Name: x, Dimensions: [-1,4,32,32], Strides: [1], StrideOrder: [3], Datatype: Half, Format: (NHWC) }], Constants: [ { Name: k, Dimensions: [16,4,3,3], Strides: [36], StrideOrder: [3], Datatype: Half, Format: (NHWC) }, { Name: a, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) }, { Name: b, Dimensions: [1,16,1,1], Strides: [16], StrideOrder: [3], Datatype: Half, Format: (NHWC) }], Outputs: [ { Name: y, Dimensions: [-1,16,32,32], Strides: [1], StrideOrder: [3], Datatype: Half, Format: (NHWC) }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: conv1][ONNX Layer: relu1]
Name: conv2_myl0_3, LayerType: correlation, Inputs: [ { Name: y, Dimensions: [-1,16,32,32], Strides: [1], StrideOrder: [3], Datatype: Int8, Format: (NHWC) }], Constants: [ { Name: k2, Dimensions: [16,16,3,3], Strides: [144], StrideOrder: [3], Datatype: Int8, Format: (NHWC) }], Outputs: [ { Name: z, Dimensions: [-1,16,32,32], Strides: [1], StrideOrder: [3], Datatype: Float, Format: (NHWC) }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: conv2][ONNX Layer: relu_QuantizeLinear]
Name: masks_myl0_4, LayerType: kgen, Inputs: [ { Name: k, Dimensions: [16,4,3,3], Strides: [36], StrideOrder: [3], Datatype: Float, Format: (NHWC) }], Constants: [], Outputs: [ { Name: m, Dimensions: [16,4,3,3], Strides: [1], StrideOrder: [3], Datatype: Float, Format: (NHWC) }], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: mask1]

I/O Tensors:
 Name: input, IOMode: Input, DataType: Half, Dimensions: [-1,3,32,32], Location: Device
"""  # noqa: E501, W291
CONVOLUTIONS = frozenset({"conv1", "conv2"})


def test_the_log_lists_each_layer_with_its_tensors_and_its_onnx_nodes() -> None:
    shapes, move, conv1, conv2, mask = layers_of_log(LOG)
    assert shapes.precision == ""
    assert move.kind == "kgen"
    assert move.inputs[0].shape == (-1, 3, 32, 32)
    assert conv1.sources == ("conv1", "relu1")
    assert conv1.kernel is not None
    assert conv1.kernel.shape == (16, 4, 3, 3)
    assert [layer.precision for layer in (move, conv1, conv2, mask)] == ["fp16", "fp16", "int8", "fp32"]


def test_the_histogram_counts_layers_that_compute() -> None:
    assert precision_histogram(layers_of_log(LOG)) == {"fp16": 2, "int8": 1, "fp32": 1}


def test_fusions_are_counted_once_and_quantizers_are_no_epilogue() -> None:
    found = count_fusions(layers_of_log(LOG), CONVOLUTIONS, frozenset({"mask1"}))
    assert found.convolutions == 2  # the layout change before conv1 carries its name too
    assert found.fused_epilogues == 1
    assert found.by_precision == {"fp16": 1, "int8": 1}
    assert found.mask_multiplications == 1


def test_other_text_holds_no_layers() -> None:
    assert layers_of_log("") == ()
    assert layers_of_log("Layers:\nsomething else\n") == ()


def tensor(name: str, shape: list[int], words: str) -> dict[str, object]:
    return {"Name": name, "Location": "Device", "Dimensions": shape, "Format/Datatype": words}


def inspector(words: str, weights: str) -> str:
    """TensorRT 10's JSON of a reformat, a fused convolution and a layer of the compiler, as published logs have it."""
    convolution = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("x", [-1, 3, 8, 8], words)],
        "Outputs": [tensor("y", [-1, 16, 8, 8], words)],
        "ParameterType": "Convolution",
        "Kernel": [3, 3],
        "OutMaps": 16,
        "Weights": {"Type": weights, "Count": 432},
        "Bias": {"Type": "Float", "Count": 16},
        "Activation": "RELU",
        "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64",
        "Metadata": "[ONNX Layer: conv1]\x1e[ONNX Layer: relu1]",
    }
    reformat = {
        "Name": "Reformatting CopyNode for Input Tensor 0 to conv1 + relu1",
        "LayerType": "Reformat",
        "Inputs": [tensor("input", [-1, 3, 8, 8], words)],
        "Outputs": [tensor("x", [-1, 3, 8, 8], words)],
        "ParameterType": "Reformat",
        "Metadata": "",
    }
    fc = {
        "Name": "fc",
        "LayerType": "gemm",
        "Inputs": [{"Name": "f", "Dimensions": [-1, 16], "Datatype": "Float", "Format": "Row major linear format"}],
        "Outputs": [{"Name": "logits", "Dimensions": [-1, 10], "Datatype": "Float"}],
        "Constants": [{"Name": "w", "Dimensions": [16, 10], "Datatype": "Float"}],
        "Metadata": "",
    }
    return json.dumps({"Layers": [reformat, convolution, fc], "Bindings": ["input", "logits"]})


UNKNOWN = "N/A due to dynamic shapes"
ENGINE_LOG = """Engine Layer Information:
Layer(Reformat): Reformatting CopyNode for Input Tensor 0 to conv1 + relu1, Tactic: 0x00000000000003e8, input (Half[-1,3,8,8]) -> x (Half[-1,3:8,8,8])
Layer(CaskConvolution): conv1 + relu1, Tactic: 0x9dcdcc67441d3742, x (Half[-1,3:8,8,8]) -> y (Half[-1,16:8,8,8])
Layer(CaskConvolution): conv2 + add, Tactic: 0x9dcdcc67441d3742, y (Int8[-1,16:32,8,8]), x[Int8(-1,16:32,8,8)] -> z (Int8[-1,16:32,8,8])
Layer(NoOp): flatten, Tactic: 0x0000000000000000, z (Int8[-1,16,8,8]) -> f (Int8[-1,1024])
"""  # noqa: E501


def test_the_inspector_json_says_the_same_in_both_of_its_dialects() -> None:
    layers = layers_of_inspector(inspector("Channel major FP16 format where channel % 8 == 0", "Half"))
    assert [layer.precision for layer in layers] == ["fp16", "fp16", "fp32"]
    assert layers[1].sources == ("conv1", "relu1")
    assert count_fusions(layers, frozenset({"conv1"})).fused_epilogues == 1


@pytest.mark.parametrize(
    ("word", "precision"), [("Half", "fp16"), ("Int8", "int8"), ("BFloat16", "bf16"), ("FP8", "fp8")]
)
def test_with_a_dynamic_batch_the_weights_say_what_the_tensors_do_not(word: str, precision: str) -> None:
    layers = read_layers({"log": "", "inspector": inspector(UNKNOWN, word)})
    assert [layer.precision for layer in layers] == ["", precision, "fp32"]
    assert precision_histogram(layers) == {precision: 1, "fp32": 1}
    fusion = count_fusions(layers, frozenset({"conv1"}))
    assert (fusion.convolutions, fusion.fused_epilogues, fusion.by_precision) == (1, 1, {precision: 1})


def test_what_neither_tensors_nor_weights_say_comes_from_the_build_log() -> None:
    layers = read_layers({"log": ENGINE_LOG, "inspector": inspector(UNKNOWN, "Half")})
    assert [layer.precision for layer in layers] == ["fp16", "fp16", "fp32"]
    assert layers[0].outputs[0].shape == (-1, 3, 8, 8)


def test_the_engine_log_of_tensorrt_lists_layers_too() -> None:
    reformat, conv1, conv2, flatten = layers_of_log(ENGINE_LOG)
    assert [layer.precision for layer in (reformat, conv1, conv2, flatten)] == ["fp16", "fp16", "int8", "int8"]
    assert conv2.sources == ("conv2", "add")
    assert [(t.name, t.shape) for t in conv2.inputs] == [("y", (-1, 16, 8, 8)), ("x", (-1, 16, 8, 8))]
    assert count_fusions(layers_of_log(ENGINE_LOG), CONVOLUTIONS).convolutions == 2


def test_an_engine_built_with_layer_names_only_has_names() -> None:
    layers = layers_of_inspector('{"Layers": ["a", "b"]}')
    assert [layer.name for layer in layers] == ["a", "b"]
    assert precision_histogram(layers) == {}


@pytest.mark.parametrize(
    ("transposed", "advice"),
    [
        (["node_up"], "quantizes no transposed convolutions.*--keep-fp32 up.2$"),
        (["node_up", "of_a_stranger"], "--keep-fp32 up.2 --keep-fp32 of_a_stranger$"),
        ([], "again with --precision int8"),
    ],
)
def test_the_advice_about_another_precision_is_one_that_helps(
    transposed: list[str], advice: str, one_node: Callable[..., Path], tmp_path: Path
) -> None:
    path = one_node(
        tmp_path / "net.onnx",
        helper.make_node("DequantizeLinear", ["up.2.weight_quantized", "scale"], ["w"], name="node_dequantize"),
        helper.make_node("ConvTranspose", ["input", "w"], ["logits"], name="node_up"),
        weights={"up.2.weight_quantized": np.ones((3, 3, 1, 1), np.int8), "scale": np.float32(1)},
    )
    fusion = count_fusions(layers_of_log(LOG.replace("Int8", "Float")), CONVOLUTIONS)
    network = {"precisions": {"int8": 2, "fp32": 0}, "transposed": transposed}
    with pytest.raises(BuildError, match=f"1 of 2 convolutions compute in fp32, where the ONNX file has 0.*{advice}"):
        refuse_other_precision(path, "int8", network, fusion, {"int8": 1, "fp32": 3})
    refuse_other_precision(path, "fp32", network, fusion, {"fp32": 3})
