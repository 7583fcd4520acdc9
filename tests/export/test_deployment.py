"""`gmconv.deploy`: a network in memory, of any class, becomes an artefact with the proof that a checkpoint gets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import gmconv
from export.deployment import Deployed
from export.precision import PrecisionOptions
from gmconv.errors import BakeError, ParityError, RefusedError, UnavailableError
from runtime.records import UNROUNDED
from runtime.runners import open_runner
from tests.gmconv.constants import calls, layers


class Soft(nn.Module):
    """A GMConv layer of a user's own: the sigma is a softplus's argument, and the kernel is computed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.rho = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.arange(3.0) - 1
        mask = torch.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * F.softplus(self.rho) ** 2))
        return F.conv2d(x, self.weight * mask, padding=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.soft = Soft()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(F.relu(self.soft(x)).mean((2, 3)))
        return found


class Several(nn.Module):
    """An image, a mask and an integer in; a dict with a list and a None out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.meta = nn.Embedding(7, 8)  # a name that torch.fx keeps for itself
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor, mask: Tensor, age: Tensor) -> dict[str, object]:
        maps = F.relu(self.conv(image)) * mask
        joined = maps.mean((2, 3)) + self.meta(age[:, 0])
        return {"scores": self.head(joined), "aux": None, "maps": [maps, F.max_pool2d(maps, 2)]}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def deployed(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return gmconv.deploy(net, torch.randn(5, 3, 16, 16), tmp_path_factory.mktemp("d") / "net.onnx")  # type: ignore[no-any-return]


def test_it_computes_what_the_network_computes_and_leaves_it_alone(net: nn.Module, deployed: Deployed) -> None:
    assert net.training
    assert isinstance(net.get_submodule("soft"), Soft)
    x = torch.randn(3, 3, 16, 16)
    with open_runner(deployed.path) as runner, torch.no_grad():
        found = runner.run({"input": x.numpy()})["logits"]
        assert np.allclose(found, net.eval()(x).numpy(), atol=1e-5)
    net.train()


def test_the_proof_runs_on_the_examples_and_the_bake_is_bitwise(deployed: Deployed) -> None:
    parity = deployed.manifests[0].parity
    assert parity is not None
    parts = {"examples, one", "examples, two more", "examples, the others"}
    assert {hop.inputs for hop in parity.hops} == {"noise, seed 0", *parts}
    assert all(hop.bitwise for hop in parity.hops if hop.name == "live -> baked")
    assert deployed.passed


def test_the_result_prints_as_the_command_does_and_as_html(deployed: Deployed) -> None:
    assert "Parity, hop by hop" in repr(deployed)
    assert repr(deployed).splitlines()[-1].startswith(f"PASSED {deployed.path}")
    html = deployed._repr_html_()
    assert html is not None
    assert html.startswith("<div")
    assert "net.onnx: verdict" in html
    assert "Kernels that were computed" in html
    assert "<script" not in html


def test_several_inputs_and_outputs_of_any_nesting(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Several().eval()
    examples = {"mask": torch.rand(3, 1, 8, 8), "image": torch.randn(3, 3, 8, 8), "age": torch.tensor([[0], [3], [6]])}
    gmconv.save_golden(net, examples, tmp_path / "golden.npz")
    done = gmconv.deploy(net, examples, tmp_path / "net.onnx", golden=tmp_path / "golden.npz")
    (manifest,) = done.manifests
    assert manifest.golden is not None
    assert manifest.golden.file == "golden.npz"
    assert [(i.name, i.dtype) for i in manifest.inputs] == [("image", "float32"), ("mask", "float32"), ("age", "int64")]
    assert [output.name for output in manifest.outputs] == ["scores", "maps.0", "maps.1"]
    with open_runner(done.path) as runner, torch.no_grad():
        found = runner.run({name: tensor.numpy() for name, tensor in examples.items()})
        expected = net(**examples)
    assert np.allclose(found["scores"], expected["scores"].numpy(), atol=1e-5)
    assert np.allclose(found["maps.1"], expected["maps"][1].numpy(), atol=1e-5)


def test_several_inputs_are_calibrated_and_judged_on_their_arrays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    arrays = {
        "image": random.standard_normal((40, 3, 8, 8)),  # float64: what numpy makes where nobody says
        "mask": random.random((40, 1, 8, 8), dtype=np.float32),
        "age": random.integers(0, 7, (40, 1)),
    }
    np.savez(tmp_path / "data.npz", **arrays)
    examples = {name: torch.from_numpy(array[:3]) for name, array in arrays.items()}
    examples["image"] = examples["image"].float()
    done = gmconv.deploy(
        Several().eval(), examples, tmp_path / "net.onnx", precisions=("int8",), images=tmp_path / "data.npz"
    )
    (manifest,) = done.manifests
    assert manifest.precision_found == {"int8": 2}
    assert manifest.calibration is not None
    assert (manifest.calibration.source, manifest.calibration.images) == ("data.npz", 40)
    assert manifest.parity is not None
    assert "images, data.npz" in {hop.inputs for hop in manifest.parity.hops}
    unrounded = [hop.outputs[0] for hop in manifest.parity.hops if hop.name.endswith(UNROUNDED)]
    assert max(one.rel_rms for one in unrounded) < 1e-4  # the head's weights are as they were there too


def test_a_golden_pair_of_another_network_is_refused_at_its_own_hop(net: nn.Module, tmp_path: Path) -> None:
    other = Net()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        other.soft.rho.add_(0.05)
    gmconv.save_golden(other, torch.randn(4, 3, 16, 16), tmp_path / "golden.npz")
    with pytest.raises(ParityError, match="recorded -> live"):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", golden=tmp_path / "golden.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["golden.npz"]


def test_a_precision_that_does_not_hold_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    twice = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    twice[0].weight.data = torch.tensor([1.0, 1.0003]).reshape(2, 1, 1, 1)  # the same number in fp16
    twice[1].weight.data = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)
    with pytest.raises(ParityError, match="nothing was written, parity failed: .*; leave fp16 out of precision to"):
        gmconv.deploy(twice, torch.randn(2, 1, 8, 8), tmp_path / "net.onnx", precision="fp32,fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_class_of_the_main_module_needs_no_file(tmp_path: Path) -> None:
    script = (
        "import torch, gmconv\n"
        "class Mine(torch.nn.Conv2d):\n"
        "    def forward(self, x): return self._conv_forward(x, self.weight * self.weight.abs().mean(), self.bias)\n"
        f"print(gmconv.deploy(Mine(3, 4, 3), torch.randn(2, 3, 8, 8), {str(tmp_path / 'net.onnx')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("PASSED ")


class Optional(nn.Conv2d):
    """A root with a kernel of its own, and an input that need not be given."""

    def forward(self, image: torch.Tensor, prior: torch.Tensor | None = None) -> torch.Tensor:
        found = nn.functional.conv2d(image, self.weight * image.mean())
        return found if prior is None else found + prior


def test_an_input_that_is_left_out_is_said_and_the_root_has_a_name(tmp_path: Path) -> None:
    with pytest.raises(BakeError, match=r"^the network itself \(Optional\): its kernel is computed from"):
        gmconv.deploy(Optional(3, 4, 3).eval(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    found = gmconv.deploy(Optional(3, 4, 3).eval(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", keep_dynamic=True)
    assert "note: prior is not given: exported as its default, None" in str(found)
    assert "the network itself" in str(found).splitlines()[4]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (torch.randn(2, 4, 16, 16), "does not run on"),
        ("nothing", "is no tensor .str"),
        (torch.tensor(1.0), "holds no samples"),
        (torch.full((2, 3, 16, 16), torch.nan), "'input' holds NaN"),
        ((torch.randn(2, 3, 8, 8), torch.randn(3, 1)), "different numbers of samples"),
    ],
)
def test_examples_that_do_not_fit_are_refused_in_a_sentence(
    examples: object, message: str, net: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=message) as refusal:
        gmconv.deploy(net, examples, tmp_path / "net.onnx")
    assert "\n" not in refusal.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_in_a_dtype_that_cannot_be_proven_is_refused_at_once(dtype: torch.dtype, tmp_path: Path) -> None:
    kind = str(dtype).removeprefix("torch.")
    x = torch.randn(2, 3, 16, 16, dtype=dtype)
    with pytest.raises(RefusedError, match=rf"is in {kind} .*\.float\(\)") as refusal:
        gmconv.deploy(Net().to(dtype), x, tmp_path / "net.onnx")
    assert "\n" not in refusal.value.message
    assert list(tmp_path.iterdir()) == []


def test_examples_in_bfloat16_are_refused_and_half_precision_is_widened(net: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(RefusedError, match=r"example 'input' is in bfloat16, .*\.float\(\)"):
        gmconv.deploy(net, x.bfloat16(), tmp_path / "net.onnx")
    found = gmconv.deploy(nn.Conv2d(3, 2, 3).half(), x.half(), tmp_path / "net.onnx")
    assert found.passed
    assert "float16 parameters were widened to float32" in repr(found)


def test_an_option_that_there_is_not_is_named(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes no 'precission'; did you mean precision?"):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", precission="fp16")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crop": "1e-x"}, "crop='1e-x': a crop tolerance is"),
        ({"precision": "fp17"}, "precision='fp17': 'fp17' is none of fp32, fp16"),
        ({"precisions": ("fp16", "fp17")}, r"precisions=\('fp16', 'fp17'\): 'fp17' is none of"),
        ({"batch": 0}, "batch=0: 0 is not in the range"),
        ({"crop_budget": "top:1"}, "crop_budget='top:1': a crop budget is"),
        ({"golden": "no.npz"}, "no.npz: no such file"),
        ({"data": "nodata"}, "nodata: no such data; give 'digits', a folder of images or an .npz file"),
        ({"images": torch.ones(2, 3, 16, 16)}, r"^images is a Tensor; it takes DIR\|FILE.npz\|digits$"),
        ({"data": np.ones((2, 3, 16, 16))}, r"^data is a ndarray; it takes DIR\|FILE.npz\|digits$"),
        ({"golden": torch.ones(2, 3, 16, 16)}, r"^golden is a Tensor; it takes FILE.npz$"),
        ({"golden": {"input": 1}}, r"^golden is a dict; it takes FILE.npz$"),
        ({"crop": "lossless", "crop_budget": "1e-2"}, "^crop and crop_budget exclude each other"),
        ({"crop_gain": "latency"}, "^crop_gain says what a crop_budget buys; give"),
        ({"flavor": "rtxx"}, "^flavor='rtxx': it takes auto, tensorrt, rtx$"),
        ({"flavor": "rtx"}, "^flavor='rtx' is of an engine: output='net.plan' builds one$"),
        ({"target": "gpu"}, "target='gpu': 'gpu' is not one of 'tensorrt', 'cpu'"),
        ({"precision": 16}, "precision is an int; it takes 'fp16,int8', or PrecisionOptions"),
        ({"precision": "bf16", "io_dtype": "fp16"}, r"io_dtype=?.* does not go with bf16"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_refused_as_by_the_command(
    options: dict[str, object], said: str, net: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=said):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_a_graph_laid_out_for_a_cpu_is_refused_before_anything_is_written(
    net: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match="an engine takes target='tensorrt'"):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.plan", precision="int8", target="cpu")
    assert list(tmp_path.iterdir()) == []


def test_labels_and_preprocessing_are_read_from_the_files_that_a_command_reads(net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("crane\ncrow\ncrane\nowl\nwren\n")  # ImageNet has two cranes
    (tmp_path / "p.json").write_text('{"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}')
    files = {"labels": str(tmp_path / "labels.txt"), "preprocessing": tmp_path / "p.json"}
    (manifest,) = gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", **files).manifests
    assert manifest.labels == ("crane", "crow", "crane", "owl", "wren")
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing.mean, manifest.preprocessing.size) == ((0.5, 0.4, 0.3), (16, 16))


def test_preprocessing_that_says_the_mean_alone_is_completed_by_the_examples(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, (8, 6)), nn.Flatten())
    said = {"mean": np.array([0.5])}
    (manifest,) = gmconv.deploy(
        net,
        torch.randn(2, 1, 8, 6),
        tmp_path / "grey.onnx",
        preprocessing=said,
        std=[0.25],
        labels=np.array(["a", "b"]),
        fuse=np.bool_(False),
    ).manifests
    assert manifest.labels == ("a", "b")
    assert manifest.preprocessing is not None
    assert (manifest.preprocessing.size, manifest.preprocessing.channel_order) == ((8, 6), "L")
    assert (manifest.preprocessing.mean, manifest.preprocessing.std) == ((0.5,), (0.25,))
    assert manifest.export is not None
    assert any("photos are stretched to 8 x 6" in note for note in manifest.export.notes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": "nolabels.txt"}, "nolabels.txt: no such file"),
        ({"labels": 0.5}, "0.5 is no list of class names"),
        ({"labels": [0, 1, 2, 3, 4]}, "is no list of class names"),
        ({"labels": ["cat", "dog"]}, "2 names for the network's 5 classes"),
        ({"preprocessing": 0.5}, "preprocessing is a float; it takes a dict, or a JSON file"),
        ({"preprocessing": "nothing.json"}, "nothing.json: no such file"),
        ({"preprocessing": {"means": [0.5]}}, "has a field 'means'; it takes"),
        ({"preprocessing": {"mean": 0.5, "std": 1}}, "Expected array, got float - at mean; mean and std take"),
        ({"preprocessing": {"mean": [0.5], "std": [0.2]}}, "1 means and 1 deviations for 3 channels"),
    ],
)
def test_labels_and_preprocessing_that_are_none_are_refused_in_a_sentence(
    given: dict[str, object], said: str, net: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=said) as refusal:
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", **given)
    assert "checkpoint" not in refusal.value.message
    assert "--" not in refusal.value.message
    assert list(tmp_path.iterdir()) == []


def test_what_deploy_takes_is_listed_with_its_own_parameters(net: nn.Module) -> None:
    with pytest.raises(TypeError, match="deploy takes no 'zzz'; it takes ") as refusal:
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), zzz=1)
    listed = str(refusal.value).partition("it takes ")[2].split(", ")
    assert {"labels", "preprocessing", "flavor", "note", "data", "keep_fp32", "calibration_seed", "batch"} <= {*listed}
    with pytest.raises(TypeError, match=r"no accuracy budget: deploy in fp32, then export.search_precision"):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), auto_precision="int8")
    with pytest.raises(TypeError, match="did you mean labels?"):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), lables=["a"])


def test_how_to_convert_is_said_flat_or_in_an_object_that_it_adds_to(net: nn.Module, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).standard_normal((40, 3, 16, 16), dtype=np.float32))
    (manifest,) = gmconv.deploy(
        net,
        torch.randn(2, 3, 16, 16),
        tmp_path / "net.onnx",
        precisions="int8",
        precision=PrecisionOptions(calibration_batch=5),
        data=tmp_path / "data.npz",
        keep_fp32="head*",
        target="cpu",
        calibration_images=33,
        calibration_method="minmax",
        calibration_seed=3,
    ).manifests
    assert manifest.precision_found == {"int8": 1, "fp32": 1}
    assert manifest.quantization is not None
    assert manifest.quantization.target == "cpu"
    assert manifest.calibration is not None
    assert (manifest.calibration.images, manifest.calibration.method) == (33, "minmax")
    assert (manifest.calibration.seed, manifest.calibration.source) == (3, "data.npz")
    assert manifest.parity is not None
    assert "images, data.npz" in {hop.inputs for hop in manifest.parity.hops}


def test_options_may_be_spelled_as_on_the_command_line(net: nn.Module, tmp_path: Path) -> None:
    done = gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", precision="fp16,bf16", crop="lossless")
    assert [file.name for file in done.files] == ["net.fp16.onnx", "net.bf16.onnx"]


@pytest.mark.parametrize("name", ["nb.plann", "nb.pt", "nb"])
def test_an_output_that_is_neither_is_refused_before_any_work(name: str, net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"did you mean .*nb\.(plan|onnx)\?"):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_names_parameters_not_flags(net: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="need calibration images: give data=DIR, data=FILE.npz") as refusal:
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", precisions=("int8",))
    assert "--" not in refusal.value.message


def test_an_engine_that_could_not_run_here_fails_nothing(net: nn.Module, tmp_path: Path) -> None:
    deployed = gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.plan")
    assert [file.name for file in deployed.files] == ["net.onnx", "net.plan"]
    assert deployed.passed
    assert "PASSED" in str(deployed)
    with pytest.raises(
        RefusedError, match=r"is there in fp32, and fp16 would replace it: output='.*/net.fp16.plan', or"
    ):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.plan", precision="fp16")


def test_an_engine_that_nothing_here_can_build_is_refused_before_the_export(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.trt.installed", lambda flavor: False)
    with pytest.raises(UnavailableError, match="TensorRT-RTX is not installed: "):
        gmconv.deploy(net, torch.randn(2, 3, 16, 16), tmp_path / "net.plan", flavor="rtx")
    assert list(tmp_path.iterdir()) == []


def test_golden_pairs_of_pixels_or_of_labels_are_refused_in_one_sentence(net: nn.Module, tmp_path: Path) -> None:
    example = torch.randn(2, 3, 16, 16)
    pixels, logits = np.zeros((2, 3, 16, 16), "uint8"), np.zeros((2, 5), "float32")
    for given, words in (
        ({"input": pixels, "output": logits}, "'input' is uint8 .* record what goes into forward, after preprocessing"),
        ({"input": example.numpy(), "output": np.zeros(2, "int64")}, r"'output' is int64 \(2,\), the network returns"),
    ):
        np.savez(tmp_path / "golden.npz", **given)
        with pytest.raises(RefusedError, match=words):
            gmconv.deploy(net, example, tmp_path / "net.onnx", golden=tmp_path / "golden.npz")


class Handing(nn.Module):
    """A wrapper of a user's own, which takes anything."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within = within

    def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
        return self.within(*args, **kwargs)


class Scaled(Net):
    def forward(self, image: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(image) * scale


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda net: torch.compile(nn.DataParallel(net))])
def test_a_network_in_wrappers_is_the_network(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    net, scale = Scaled().eval(), torch.tensor([[1.0], [2.0], [3.0]])
    image = torch.randn(3, 3, 8, 8)
    wrapped = wrap(net)
    done = gmconv.deploy(wrapped, {"scale": scale, "image": image}, tmp_path / "net.onnx")
    assert [spec.name for spec in done.manifests[0].inputs] == ["image", "scale"]
    assert done.manifests[0].arch is not None
    assert "Scaled, in memory" in done.manifests[0].arch
    with open_runner(done.path) as runner, torch.no_grad():
        found = runner.run({"image": image.numpy(), "scale": scale.numpy()})["logits"]
        assert np.allclose(found, net(image, scale).numpy(), atol=1e-5)
    assert isinstance(wrapped, nn.Module)


def test_a_forward_that_was_compiled_in_place_is_taken_as_written(tmp_path: Path) -> None:
    net, image = layers.Net(calls.InPlace).eval(), torch.randn(3, 3, 16, 16)
    net.forward = torch.compile(net.forward, backend="eager")  # type: ignore[method-assign]
    assert gmconv.deploy(net, image, tmp_path / "net.onnx").passed
    assert "forward" in vars(net), "the user's own stays compiled"


def test_torchscript_is_refused_in_a_sentence(net: nn.Module, tmp_path: Path) -> None:
    examples = torch.randn(2, 3, 16, 16)
    traced: Any = torch.jit.trace(net, examples)
    for model in (traced, nn.DataParallel(traced), nn.Sequential(traced)):
        with pytest.raises(BakeError, match="is TorchScript, .*: start from the Python model"):
            gmconv.deploy(model, examples, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


class Odd(Net):
    """Its train returns nothing, and it returns a parameter beside its logits."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.head.weight


def test_a_train_that_returns_nothing_and_an_output_that_is_a_parameter_are_borne(tmp_path: Path) -> None:
    assert gmconv.deploy(Odd(), torch.randn(3, 3, 16, 16), tmp_path / "net.onnx").passed


class Single(Net):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError("one at a time")
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Single, r"in a batch of 2 \(one at a time\); give batch=N where it takes one size alone"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), r"'0\.weight' is lazy and has no values yet"),
        (lambda: Net().to("meta"), "'soft.weight' is on the meta device and has no values"),
    ],
)
def test_a_network_that_cannot_run_is_refused_in_a_sentence(
    make: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=words):
        gmconv.deploy(make(), torch.randn(3, 3, 16, 16), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_bfloat16_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    net.register_forward_hook(lambda *given: given[2].bfloat16())
    with pytest.raises(RefusedError, match=r"^output 'logits' is in bfloat16 .* \(\.float\(\)\)$"):
        gmconv.deploy(net, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrapper_that_takes_anything_takes_its_examples_in_order(tmp_path: Path) -> None:
    net, scale, image = Handing(Scaled()), torch.tensor([[1.0], [2.0], [3.0]]), torch.randn(3, 3, 8, 8)
    done = gmconv.deploy(net, (image, scale), tmp_path / "net.onnx")
    assert [spec.shape for spec in done.manifests[0].inputs] == [("batch", 3, 8, 8), ("batch", 1)]
    assert gmconv.deploy(Handing(Net()), image, tmp_path / "one.onnx").passed
    with pytest.raises(RefusedError, match=r"takes \*args, .* give a tuple of examples in its order, or the network"):
        gmconv.deploy(net, {"scale": scale, "image": image}, tmp_path / "named.onnx")
