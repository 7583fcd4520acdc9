"""tritonclient's surface, HTTP and gRPC, sync and asyncio, against a running server."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as tg
import tritonclient.grpc.aio as tga
import tritonclient.http as th
import tritonclient.http.aio as tha
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from ..conftest import DTYPES, LABELS, Server, write_model

TRITON = {"float16": "FP16", "float32": "FP32", "float64": "FP64"}
Start = Callable[..., Server]
CLIENTS = [pytest.param("http", id="http"), pytest.param("grpc", id="grpc")]


def connect(server: Server, kind: str) -> tuple[Any, Any]:
    library = th if kind == "http" else tg
    return library, library.InferenceServerClient(server.http if kind == "http" else server.grpc)


def reference(models: Path, x: np.ndarray, version: int = 2) -> np.ndarray:
    session = ort.InferenceSession(models / "tiny" / str(version) / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


def image_input(library: Any, x: np.ndarray, **options: Any) -> Any:
    tensor = library.InferInput("input", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, **options)
    return tensor


@pytest.mark.parametrize("kind", CLIENTS)
def test_documents(server: Server, kind: str) -> None:
    _, client = connect(server, kind)
    json = {"as_json": True} if kind == "grpc" else {}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("nobody")
    assert "binary_tensor_data" in client.get_server_metadata(**json)["extensions"]
    metadata = client.get_model_metadata("tiny", **json)
    assert metadata["versions"] == ["1", "2"]
    assert [int(d) for d in metadata["inputs"][0]["shape"]] == [-1, 3, 8, 8]
    config = client.get_model_config("tiny", "1", **json)
    config = config.get("config", config)
    assert config["max_batch_size"] == 32
    assert [int(d) for d in config["input"][0]["dims"]] == [3, 8, 8]
    assert client.get_log_settings(**json)


@pytest.mark.parametrize("kind", CLIENTS)
def test_statistics_count_requests(server: Server, kind: str) -> None:
    library, client = connect(server, kind)
    json = {"as_json": True} if kind == "grpc" else {}

    def count() -> tuple[int, int, int]:
        entry = client.get_inference_statistics("tiny", "1", **json)["model_stats"][0]
        stats = entry["inference_stats"]
        return int(entry["inference_count"]), int(stats["success"]["count"]), int(stats["queue"].get("count", 0))

    client.infer("tiny", [image_input(library, np.ones((1, 3, 8, 8), "f4"))], "1")
    before = count()
    client.infer("tiny", [image_input(library, np.ones((5, 3, 8, 8), "f4"))], "1")
    assert [a - b for a, b in zip(count(), before, strict=True)] == [5, 1, 1]
    assert len(client.get_inference_statistics(**json)["model_stats"]) == 5


@pytest.mark.parametrize("kind", CLIENTS)
def test_infer_equals_onnxruntime_for_each_version(server: Server, models: Path, kind: str) -> None:
    library, client = connect(server, kind)
    x = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)
    for version, expected in (("1", 1), ("2", 2), ("", 2)):
        answer = client.infer("tiny", [image_input(library, x)], model_version=version, request_id="r-7")
        np.testing.assert_array_equal(answer.as_numpy("logits"), reference(models, x, expected))
        response = answer.get_response()
        response = response if kind == "http" else {"id": response.id, "model_version": response.model_version}
        assert response["id"] == "r-7"
        assert response["model_version"] == str(expected)


@pytest.mark.parametrize("kind", CLIENTS)
def test_several_instances_answer_as_one(start: Start, models: Path, kind: str) -> None:
    server = start(models, "--instances", "3", "--solo-threads", "2")
    library, client = connect(server, kind)
    draw = np.random.default_rng(0)
    images = [draw.random((rows, 3, 8, 8), np.float32) for rows in (1, 2, 5, 1, 8, 3)]
    for x in images:  # alone, then together
        answer = client.infer("tiny", [image_input(library, x)])
        np.testing.assert_allclose(answer.as_numpy("logits"), reference(models, x), rtol=1e-5, atol=1e-6)
    with ThreadPoolExecutor(6) as pool:
        clients = [connect(server, kind)[1] for _ in images]
        asked = [pool.submit(c.infer, "tiny", [image_input(library, x)]) for c, x in zip(clients, images, strict=True)]
        for x, answer in zip(images, asked, strict=True):
            logits = answer.result().as_numpy("logits")
            np.testing.assert_allclose(logits, reference(models, x), rtol=1e-5, atol=1e-6)


def lookup(path: Path) -> Path:
    """total = sum of an image + a row of a table of ten: two inputs of other ranks and types."""
    table = numpy_helper.from_array(np.arange(10, dtype="f4")[:, None], "table")
    return write_model(
        path,
        [
            helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("Gather", ["table", "age"], ["rows"]),
            helper.make_node("Flatten", ["rows"], ["row"]),
            helper.make_node("Add", ["flat", "row"], ["total"]),
        ],
        [
            helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 4, 4]),
            helper.make_tensor_value_info("age", TensorProto.INT64, ["batch", 1]),
        ],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, ["batch", 1])],
        [table],
    )


def test_inputs_of_several_types_and_an_index_beyond_the_table(start: Start, tmp_path: Path) -> None:
    server = start(lookup(tmp_path / "model.onnx"), "--model-name", "two")
    for kind in ("http", "grpc"):
        library, client = connect(server, kind)

        def infer(rows: int, age: int, library: Any = library, client: Any = client) -> Any:
            image, ages = np.full((rows, 1, 4, 4), 0.25, "f4"), np.full((rows, 1), age)
            inputs = [library.InferInput("image", [rows, 1, 4, 4], "FP32")]
            inputs.append(library.InferInput("age", [rows, 1], "INT64"))
            for tensor, values in zip(inputs, (image, ages), strict=True):
                tensor.set_data_from_numpy(values)
            return client.infer("two", inputs).as_numpy("total").tolist()

        assert infer(3, 9) == [[9.25]] * 3
        with pytest.raises(InferenceServerException, match="out of data bounds"):
            infer(1, 10)
        assert infer(1, 4) == [[4.25]], "what a client sends does not stop the server"


@pytest.mark.parametrize("kind", CLIENTS)
def test_every_dtype_round_trips(server: Server, kind: str) -> None:
    library, client = connect(server, kind)
    inputs, sent = [], {}
    rng = np.random.default_rng(1)
    for name in DTYPES:
        dtype = np.dtype(name)
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            array = rng.integers(info.min, info.max, (2, 3), dtype, endpoint=True)
            array[0, :2] = info.min, info.max
        elif dtype.kind == "b":
            array = rng.random((2, 3)) > 0.5
        else:
            array = rng.standard_normal((2, 3)).astype(dtype)
            array[0, :3] = np.nan, np.inf, -0.0
        sent[name] = array
        tensor = library.InferInput(f"{name}_in", [2, 3], TRITON.get(name, name.upper()))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    answer = client.infer("types", inputs)
    for name, array in sent.items():
        got = answer.as_numpy(f"{name}_out")
        assert got.dtype == array.dtype
        assert got.tobytes() == array.tobytes()


def test_json_tensors_in_and_out(server: Server) -> None:
    client = th.InferenceServerClient(server.http)
    inputs = []
    for name in DTYPES:
        tensor = th.InferInput(f"{name}_in", [1, 3], TRITON.get(name, name.upper()))
        tensor.set_data_from_numpy(np.array([[0, 1, 1]], name), binary_data=name == "float16")
        inputs.append(tensor)
    outputs = [th.InferRequestedOutput(f"{n}_out", binary_data=False) for n in DTYPES]
    answer = client.infer("types", inputs, outputs=outputs)
    for name in DTYPES:
        np.testing.assert_array_equal(answer.as_numpy(f"{name}_out"), np.array([[0, 1, 1]], name))


@pytest.mark.parametrize("kind", CLIENTS)
def test_classification_output(server: Server, models: Path, kind: str) -> None:
    library, client = connect(server, kind)
    x = np.random.default_rng(3).random((2, 3, 8, 8), np.float32)
    output = library.InferRequestedOutput("logits", class_count=3)
    got = client.infer("tiny", [image_input(library, x)], outputs=[output]).as_numpy("logits")
    logits = reference(models, x)
    assert got.shape == (2, 3)
    for row, scores in zip(got, logits, strict=True):
        for text, index in zip(row, np.argsort(-scores), strict=False):
            score, found, label = text.decode().split(":")
            assert (int(found), label) == (index, LABELS[index])
            assert float(score) == pytest.approx(scores[index], abs=1e-5)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_http_compression(server: Server, algorithm: str) -> None:
    client = th.InferenceServerClient(server.http)
    x = np.random.default_rng(0).random((32, 400), np.float32)
    inputs = [th.InferInput(n, list(x.shape), "FP32") for n in "ab"]
    for tensor in inputs:
        tensor.set_data_from_numpy(x)
    answer = client.infer(
        "add", inputs, request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    np.testing.assert_array_equal(answer.as_numpy("y"), x + x)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_grpc_compression(server: Server, models: Path, algorithm: str) -> None:
    client = tg.InferenceServerClient(server.grpc)
    x = np.ones((4, 3, 8, 8), np.float32)
    answer = client.infer("tiny", [image_input(tg, x)], compression_algorithm=algorithm)
    np.testing.assert_array_equal(answer.as_numpy("logits"), reference(models, x))


@pytest.mark.parametrize("kind", CLIENTS)
def test_parameters(server: Server, kind: str) -> None:
    library, client = connect(server, kind)
    x = [image_input(library, np.ones((1, 3, 8, 8), "f4"))]
    client.infer("tiny", x, priority=3, timeout=5_000_000, parameters={"note": "kept out of the way"})
    with pytest.raises(InferenceServerException, match="keep no state"):
        client.infer("tiny", x, sequence_id=5, sequence_start=True)


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize(
    ("model", "shape", "datatype", "message", "status"),
    [
        ("nobody", (1, 3, 8, 8), "FP32", "unknown model", ("404", "NOT_FOUND")),
        ("tiny", (33, 3, 8, 8), "FP32", "batch-size must be <= 32", ("400", "INVALID_ARGUMENT")),
        ("tiny", (1, 3, 8, 9), "FP32", "unexpected shape", ("400", "INVALID_ARGUMENT")),
        ("tiny", (3, 8, 8), "FP32", "unexpected shape", ("400", "INVALID_ARGUMENT")),
        ("tiny", (1, 3, 8, 8), "FP64", "data-type", ("400", "INVALID_ARGUMENT")),
        ("fixed", (2, 3, 8, 8), "FP32", "unexpected shape", ("400", "INVALID_ARGUMENT")),
    ],
)
def test_errors_have_tritons_codes(
    server: Server, kind: str, model: str, shape: tuple[int, ...], datatype: str, message: str, status: tuple[str, str]
) -> None:
    library, client = connect(server, kind)
    tensor = library.InferInput("input", list(shape), datatype)
    tensor.set_data_from_numpy(np.ones(shape, "f4" if datatype == "FP32" else "f8"))
    with pytest.raises(InferenceServerException, match=message) as caught:
        client.infer(model, [tensor])
    assert status[kind == "grpc"] in caught.value.status()


@pytest.mark.parametrize("kind", CLIENTS)
def test_settings_over_the_network(server: Server, kind: str) -> None:
    _, client = connect(server, kind)
    json = {"as_json": True} if kind == "grpc" else {}
    client.update_log_settings({"log_info": True}, **json)
    with pytest.raises(InferenceServerException, match="network"):
        client.update_log_settings({"log_file": "/etc/passwd"})


@pytest.mark.parametrize("kind", CLIENTS)
def test_async_infer_of_the_sync_client(server: Server, models: Path, kind: str) -> None:
    library, client = connect(server, kind)
    x = np.random.default_rng(5).random((2, 3, 8, 8), np.float32)
    if kind == "http":
        result = client.async_infer("tiny", [image_input(library, x)]).get_result()
    else:
        done: queue.Queue[Any] = queue.Queue()
        client.async_infer("tiny", [image_input(library, x)], callback=lambda result, error: done.put(error or result))
        result = done.get(timeout=20)
    np.testing.assert_array_equal(result.as_numpy("logits"), reference(models, x))


def test_grpc_stream_answers_in_order_and_survives_an_error(server: Server, models: Path) -> None:
    client = tg.InferenceServerClient(server.grpc)
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put(error or result))
    xs = [np.full((1 + i % 4, 3, 8, 8), i, np.float32) for i in range(20)]
    for i, x in enumerate(xs):
        client.async_stream_infer("tiny" if i != 7 else "nobody", [image_input(tg, x)], request_id=str(i))
    answers = [done.get(timeout=20) for _ in xs]
    client.stop_stream()
    for i, (x, answer) in enumerate(zip(xs, answers, strict=True)):
        if i == 7:
            assert "unknown model" in str(answer)
            continue
        assert answer.get_response().id == str(i)
        np.testing.assert_allclose(answer.as_numpy("logits"), reference(models, x), rtol=1e-5, atol=1e-5)


def test_grpc_stream_final_flag(server: Server) -> None:
    client = tg.InferenceServerClient(server.grpc)
    done: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: done.put(error or result))
    x = image_input(tg, np.ones((1, 3, 8, 8), "f4"))
    client.async_stream_infer("tiny", [x], enable_empty_final_response=True)
    response = done.get(timeout=20).get_response()
    client.stop_stream()
    assert response.parameters["triton_final_response"].bool_param


def test_grpc_typed_contents(server: Server) -> None:
    from tritonclient.grpc import service_pb2

    client = tg.InferenceServerClient(server.grpc)
    request = service_pb2.ModelInferRequest(model_name="types", id="t")
    fields = {"float32": "fp32", "float64": "fp64", "int64": "int64", "uint64": "uint64", "bool": "bool"}
    names = [n for n in DTYPES if n != "float16"]
    for name in names:
        tensor = request.inputs.add(name=f"{name}_in", datatype=TRITON.get(name, name.upper()), shape=[1, 3])
        field = fields.get(name, "uint" if name.startswith("u") else "int") + "_contents"
        getattr(tensor.contents, field).extend([1, 0, 1])
    with pytest.raises(Exception, match="missing.*float16_in"):
        client._client_stub.ModelInfer(request)
    request.inputs.add(name="float16_in", datatype="FP16", shape=[1, 3])
    with pytest.raises(Exception, match="raw_input_contents only"):
        client._client_stub.ModelInfer(request)


def test_asyncio_clients(server: Server, models: Path) -> None:
    x = np.random.default_rng(8).random((2, 3, 8, 8), np.float32)
    expected = reference(models, x)

    async def use() -> None:
        async with tha.InferenceServerClient(server.http) as client:
            assert await client.is_server_ready()
            assert (await client.get_model_metadata("tiny"))["name"] == "tiny"
            answers = await asyncio.gather(*(client.infer("tiny", [image_input(th, x)]) for _ in range(20)))
            for answer in answers:
                np.testing.assert_allclose(answer.as_numpy("logits"), expected, rtol=1e-5, atol=1e-5)
        async with tga.InferenceServerClient(server.grpc) as client:
            assert await client.is_model_ready("tiny")
            answers = await asyncio.gather(*(client.infer("tiny", [image_input(tg, x)]) for _ in range(20)))
            for answer in answers:
                np.testing.assert_allclose(answer.as_numpy("logits"), expected, rtol=1e-5, atol=1e-5)

            async def requests() -> Any:
                for i in range(5):
                    yield {"model_name": "tiny", "inputs": [image_input(tg, x)], "request_id": str(i)}

            ids = []
            async for result, error in client.stream_infer(requests()):
                assert error is None
                ids.append(result.get_response().id)
            assert ids == list("01234")

    asyncio.run(use())


def test_removed_by_design(server: Server) -> None:
    http, grpc = th.InferenceServerClient(server.http), tg.InferenceServerClient(server.grpc)
    calls = {
        "get_system_shared_memory_status": (),
        "get_cuda_shared_memory_status": (),
        "register_system_shared_memory": ("n", "/k", 16),
        "load_model": ("tiny",),
        "unload_model": ("tiny",),
    }
    for name, args in calls.items():
        with pytest.raises(InferenceServerException, match="Not Found"):
            getattr(http, name)(*args)
        with pytest.raises(InferenceServerException) as caught:
            getattr(grpc, name)(*args)
        assert "UNIMPLEMENTED" in str(caught.value.status())
        assert "NotImplementedError" not in str(caught.value)
    tensor = tg.InferInput("input", [1, 3, 8, 8], "FP32")
    tensor.set_shared_memory("region", 768)
    with pytest.raises(InferenceServerException, match="shared memory is not supported"):
        grpc.infer("tiny", [tensor])


def test_cancelled_streams_leave_the_server_alive(server: Server) -> None:
    """Tasks that outlived their call asked its freed object, which killed the process after a few dozen of these."""

    async def run() -> None:
        tensor = image_input(tg, np.zeros((8, 3, 8, 8), "f4"))
        async with tga.InferenceServerClient(server.grpc) as client:

            async def requests() -> Any:
                for _ in range(60):
                    yield {"model_name": "tiny", "inputs": [tensor]}

            for _ in range(100):
                answers = client.stream_infer(requests())
                async for _ in answers:
                    answers.cancel()
                    break

    asyncio.run(run())
    assert server.process.poll() is None
    assert server.request("GET", "/v2/health/ready")[0] == 200
