"""`gmconv.architecture`: a name that leads nowhere is answered with the one that was meant, never with a stranger's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from gmconv.architecture import build, factory_keywords
from gmconv.errors import ArchitectureUnavailableError, CheckpointError


def refused(arch: str) -> str:
    with pytest.raises((ArchitectureUnavailableError, CheckpointError)) as refusal:
        build(arch, {}, "net.pt", trusted=True)
    return str(refusal.value.message)


@pytest.mark.parametrize("arch", ["torchvison:resnet18", "torch_vision:resnet18", "torchvsion.models:resnet18"])
def test_a_zoo_that_is_misspelt_is_named_and_nothing_is_installed(arch: str) -> None:
    message = refused(arch)
    assert "did you mean torchvision:resnet18?" in message
    assert "pip install" not in message


@pytest.mark.parametrize("arch", ["mypackage.nets:make", "nothing:resnet18"])
def test_a_package_of_the_users_is_looked_for_not_installed(arch: str) -> None:
    message = refused(arch)
    assert f"no module {arch.split('.')[0].split(':')[0]}" in message
    assert "pip install" not in message


def test_a_module_that_is_misspelt_or_lies_in_src_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path / "own_zoo", tmp_path / "src" / "zoo_in_src"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "nets.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert "did you mean own_zoo.nets:make?" in refused("own_zoo.net:make")
    assert "did you mean own_zoo.nets:make?" in refused("own_zo.nets:make")
    assert "it lies in" in (message := refused("zoo_in_src.nets:make"))
    assert "set PYTHONPATH=src" in message


def test_a_module_without_its_factory_is_no_network_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets_alone.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    assert "did you mean a factory of your own, own_nets_alone:make?" in refused("own_nets_alone")
    assert "did you mean own_nets_alone:make?" in refused("own_nets_alone.make")
    (tmp_path / "own_package" / "deep").mkdir(parents=True)
    (tmp_path / "own_package" / "nets.py").write_text("raise SystemExit('imported')\n")
    assert "did you mean a factory of your own, own_package.nets:make?" in refused("own_package.nets")
    assert "did you mean a factory of your own, own_package.deep:make?" in refused("own_package.deep")
    assert "did you mean own_package.nets:make?" in refused("own_package.nets.make")
    assert "is a file; name the module: own_nets_alone:make" in refused("own_nets_alone.py")
    assert "did you mean resnet32 or resnet20" in refused("resnet21")
    with pytest.raises(CheckpointError, match="known: "):  # a file's word leads to nobody's module
        build("own_nets_alone", {}, "net.pt", trusted=False)


def test_what_a_module_of_the_users_lacks_is_not_called_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets_that_lack.py").write_text("import einopsy\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "own_nets_that_lack is there and does not import (No module named 'einopsy')" in refused(
        "own_nets_that_lack:make"
    )


@pytest.mark.parametrize("source", ["import sys\nsys.exit(0)\n", "def make():\n    raise SystemExit(0)\n"])
def test_a_program_that_ends_itself_is_no_success(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"own_nets_that_end_{len(source)}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    message = refused(f"{module}:make")
    assert "ends the program when it is imported" in message or "SystemExit" in message


def test_a_factory_of_torchscript_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import torch\ndef make():\n    return torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))\n"
    (tmp_path / "own_nets_traced.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert refused("own_nets_traced:make").startswith("net.pt: what own_nets_traced:make returned is TorchScript")


def test_a_network_in_place_of_its_factory_or_without_a_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from torch import nn\nready = nn.Linear(2, 2)\ndef empty(): return nn.Linear(2, 2, device='meta')\n"
    (tmp_path / "own_nets_ready.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "own_nets_ready:ready is a network, not a factory: name a function" in refused("own_nets_ready:ready")
    assert "makes 'weight' on the meta device, where nothing can be loaded" in refused("own_nets_ready:empty")


def test_an_exception_that_is_none_of_pythons_is_a_refusal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class Odd(BaseException): ...\ndef make(): raise Odd('no')\ndef stop(): raise KeyboardInterrupt\n"
    (tmp_path / "own_nets_that_are_odd.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert "(Odd: no)" in refused("own_nets_that_are_odd:make")
    with pytest.raises(KeyboardInterrupt):
        build("own_nets_that_are_odd:stop", {}, "net.pt", trusted=True)


@pytest.mark.parametrize("works", [True, False])
def test_the_working_directory_outlives_a_factory_that_changes_it(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"own_nets_that_move_{works}"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{module}.py").write_text(
        "import os\nfrom torch import nn\nos.chdir('elsewhere')\n"
        f"def make():\n    os.chdir('/')\n    return nn.Linear(2, 2) if {works} else {{}}['lacking']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert factory_keywords(f"{module}:make", "net.pt") == set()
    assert Path.cwd() == tmp_path
    if works:
        build(f"{module}:make", {}, "net.pt", trusted=True)
    else:
        assert "KeyError: 'lacking'" in refused(f"{module}:make")
    assert Path.cwd() == tmp_path


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def resnet18(weights: object = None) -> nn.Module:
        return nn.Linear(2, 2)

    models = SimpleNamespace(
        list_models=lambda: ["resnet18", "resnet34"],
        get_model_builder=lambda name: resnet18,
        get_model=lambda name, **kwargs: resnet18(**kwargs),
    )
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_is_written_as_timm_is() -> None:
    assert isinstance(build("torchvision:resnet18", {}, "net.pt", trusted=False), nn.Linear)
    assert isinstance(build("torchvision.models:resnet18", {}, "net.pt", trusted=False), nn.Linear)
    assert "did you mean torchvision:resnet18" in refused("torchvision:resnet81")


def test_a_factory_that_is_misspelt_is_answered_with_its_neighbours() -> None:
    assert "did you mean gmconv.models.registry:create?" in refused("gmconv.models.registry:creat")


def test_a_class_of_a_notebook_is_refused_while_there_is_something_to_do() -> None:
    assert "put it into a module, or hand the network itself to gmconv.deploy" in refused("__main__:Net")


def test_a_file_instead_of_a_module_is_answered_with_the_module_alone() -> None:
    assert refused("nets/my.py:make") == "net.pt: nets/my.py is a file; name the module: nets.my:make"


def test_what_a_factory_refuses_in_a_sentence_is_said_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from gmconv.errors import SurgeryError\ndef make():\n    raise SurgeryError('conv1: has no sigma')\n"
    (tmp_path / "own_nets_that_refuse.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert refused("own_nets_that_refuse:make") == "net.pt: conv1: has no sigma"
