"""The server beside LitServe, MLServer, KServe and PyTriton: same ONNX file, same threads, interleaved with wrk.

python tests/bench/serve_peers.py model.onnx --peers litserve,mlserver,kserve,pytriton --venvs /tmp/peers

Each peer lives in a virtual environment of its own, made on the first run. KServe and PyTriton get the same binary body
as this server; MLServer 1.7 takes JSON only, LitServe JSON of one's own making (here the tensor in base64).
wrk: apt-get install wrk.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import onnxruntime
from serve_throughput import LUA, request_body, start_server, wrk

COMMON = """
import os, sys
import numpy as np, onnxruntime as ort
MODEL, PORT, THREADS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def session():
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    return ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
"""
LITSERVE = (
    COMMON
    + """
import litserve as ls
import base64
from fastapi import Response
class Api(ls.LitAPI):
    def setup(self, device):
        self.session = session()
        self.input = self.session.get_inputs()[0]
        self.shape = [d if isinstance(d, int) else -1 for d in self.input.shape[1:]]
    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["tensor"]), np.float32).reshape(self.shape)
    def batch(self, inputs): return np.stack(inputs)
    def predict(self, x): return self.session.run(None, {self.input.name: x})[0]
    def unbatch(self, output): return list(output)
    def encode_response(self, output): return Response(content=output.tobytes(), media_type="application/octet-stream")
if __name__ == "__main__":
    api = Api(max_batch_size=32, batch_timeout=0.0, api_path="/v2/models/m/infer")
    ls.LitServer(api, accelerator="cpu").run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="error")
"""
)
KSERVE = (
    COMMON
    + """
import kserve
class Model(kserve.Model):
    def __init__(self):
        super().__init__("m")
        self.session = session()
        self.name_in, self.name_out = self.session.get_inputs()[0].name, self.session.get_outputs()[0].name
        self.ready = True
    def predict(self, payload, headers=None, response_headers=None):
        y = self.session.run(None, {self.name_in: payload.inputs[0].as_numpy()})[0]
        out = kserve.InferOutput(self.name_out, list(y.shape), "FP32")
        out.set_data_from_numpy(y, binary_data=True)
        return kserve.InferResponse(payload.id or "0", "m", [out])
kserve.ModelServer(http_port=PORT, enable_grpc=False, workers=1, access_log_format=None).start([Model()])
"""
)
PYTRITON = (
    COMMON
    + """
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor, DynamicBatcher
from pytriton.triton import Triton, TritonConfig
s = session()
i, o = s.get_inputs()[0], s.get_outputs()[0]
@batch
def infer(**feeds): return s.run(None, feeds)
with Triton(config=TritonConfig(http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, log_verbose=0)) as triton:
    triton.bind("m", infer, inputs=[Tensor(name=i.name, dtype=np.float32, shape=tuple(i.shape[1:]))],
        outputs=[Tensor(name=o.name, dtype=np.float32, shape=tuple(o.shape[1:]))],
        config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=0)))
    triton.serve()
"""
)
MLSERVER = """
import os
import numpy as np, onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Model(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        self.session = ort.InferenceSession(os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"])
        return True
    async def predict(self, payload):
        x = NumpyCodec.decode_input(payload.inputs[0])
        y = self.session.run(None, {payload.inputs[0].name: x})[0]
        return InferenceResponse(model_name="m", outputs=[NumpyCodec.encode_output("logits", y)])
"""
ENGINE = f"onnxruntime=={onnxruntime.__version__}"
PACKAGES = {
    "litserve": ["litserve==0.2.19", ENGINE, "numpy"],
    "mlserver": ["mlserver==1.7.1", ENGINE, "numpy<2"],
    "kserve": ["kserve==0.21", ENGINE, "numpy"],
    "pytriton": ["nvidia-pytriton==0.7.0", ENGINE, "numpy"],
}
SCRIPTS = {"litserve": LITSERVE, "kserve": KSERVE, "pytriton": PYTRITON}


def environment(folder: Path, name: str, base: str = sys.executable) -> Path:
    """The python of the peer's virtual environment; made from the interpreter `base` and filled if missing."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        print(f"installing {name}", file=sys.stderr)
        subprocess.run([base, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES[name]], check=True)
    return python


def library_folder(python: Path) -> str:
    """Where the interpreter's own libpython lies: PyTriton's stub loads the first one found, which must not be another
    release's (Debian's, say) than the interpreter whose modules it then imports."""
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def free_port() -> int:
    """A port nobody listens on, with two free above it as a rule."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start_peer(name: str, python: Path, model: Path, threads: int, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The peer, listening."""
    port = free_port()
    log = (folder / f"{name}.log").open("wb")
    env = {**os.environ, "BENCH_MODEL": str(model), "BENCH_THREADS": str(threads)}
    if name == "pytriton":
        env["LD_LIBRARY_PATH"] = library_folder(python)
    if name == "mlserver":
        (folder / "mlmodel.py").write_text(MLSERVER)
        settings = {
            "http_port": port,
            "grpc_port": port + 1,
            "metrics_port": port + 2,
            "parallel_workers": 0,
            "debug": False,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "model-settings.json").write_text(
            json.dumps({"name": "m", "implementation": "mlmodel.Model", "max_batch_size": 32, "max_batch_time": 0.001})
        )
        command = [str(python.parent / "mlserver"), "start", str(folder)]
    else:
        script = folder / f"peer_{name}.py"
        script.write_text(SCRIPTS[name])
        command = [str(python), str(script), str(model), str(port), str(threads)]
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=env, start_new_session=True)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            time.sleep(3)
            return process, port
        except OSError:
            time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    raise RuntimeError(f"{name} did not start: {(folder / f'{name}.log').read_text()[-1500:]}")


def answers(port: int, body: Path, name: str, length: int) -> bool:
    """Whether the peer answers 200 within half a minute of listening."""
    binary = {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}
    headers = binary if name in ("kserve", "pytriton") else {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/m/infer", body.read_bytes(), headers)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            time.sleep(0.5)
    return False


def script_for(folder: Path, name: str, body: bytes, length: int) -> Path:
    """wrk's script for a peer: binary, or JSON for MLServer."""
    text = LUA
    if name == "mlserver":
        header = json.loads(body[:length])
        tensor = header["inputs"][0]
        del tensor["parameters"], header["parameters"]
        tensor["data"] = np.frombuffer(body[length:], np.float32).tolist()
        body = json.dumps(header).encode()
        text = LUA.replace('wrk.headers["Inference-Header-Content-Length"] = "{length}"\n', "").replace(
            "application/octet-stream", "application/json"
        )
    if name == "litserve":
        body = json.dumps({"tensor": base64.b64encode(body[length:]).decode()}).encode()
        text = LUA.replace("application/octet-stream", "application/json")
    (folder / f"{name}.body").write_bytes(body)
    script = folder / f"{name}.lua"
    script.write_text(text.format(body=folder / f"{name}.body", length=length))
    return script


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", default="litserve,mlserver,kserve,pytriton")
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "serve-peers")
    parser.add_argument("--python", default=sys.executable, help="interpreter for new environments")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    model = args.model.resolve()
    clients = [int(c) for c in args.clients.split(",")]
    ours, ports = start_server(model, "--threads", str(args.threads))
    servers: dict[str, int] = {"ours": ports["http_port"]}
    processes: list[subprocess.Popen[bytes]] = []
    rows: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            body, length = request_body(ports["http_port"])
            scripts = {"ours": script_for(folder, "ours", body, length)}
            for peer in filter(None, args.peers.split(",")):
                try:
                    process, port = start_peer(
                        peer, environment(args.venvs, peer, args.python), model, args.threads, folder
                    )
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{peer}: {error}", file=sys.stderr)
                    continue
                processes.append(process)
                scripts[peer] = script_for(folder, peer, body, length)
                if answers(port, folder / f"{peer}.body", peer, length):
                    servers[peer] = port
                else:
                    print(f"{peer} gives no answer: {(folder / f'{peer}.log').read_text()[-500:]}", file=sys.stderr)
            for server, port in servers.items():
                wrk(port, scripts[server], 8, 1)
            for _ in range(args.rounds):
                for count in clients:
                    for server, port in servers.items():
                        rows.setdefault((server, count), []).append(wrk(port, scripts[server], count, args.seconds))
        finally:
            ours.terminate()
            for process in processes:
                process.terminate()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves workers behind
            ours.wait(60)
    table = {
        server: {
            c: {k: statistics.median(r[k] for r in rows[server, c]) for k in ("qps", "p50", "p99", "status", "broken")}
            for c in clients
        }
        for server in servers
    }
    if args.json:
        print(json.dumps(table, indent=1))
        return
    print("server     clients     qps  p50 ms  p99 ms  errors")
    for server, by_clients in table.items():
        for count, r in by_clients.items():
            errors = r["status"] + r["broken"]
            print(f"{server:10} {count:7} {r['qps']:7.0f} {r['p50']:7.2f} {r['p99']:7.2f} {errors:7.0f}")


if __name__ == "__main__":
    main()
