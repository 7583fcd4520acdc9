"""The arrows of the design, enforced from the imports themselves.

export -> runtime -> (one file) -> gmconv, whose ground floor everybody may use.
"""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("gmconv", "runtime", "export")
TORCH_RUNNER = Path("runtime/runners/torch.py")
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).parent.parts) for room in ROOMS for path in (ROOT / room).rglob("__main__.py")
)
#: The ground floor: what every room may import, without torch.
GROUND = {
    "gmconv." + name
    for name in (
        "asking",
        "classes",
        "errors",
        "cli",
        "files",
        "images",
        "preprocessing",
        "data",
        "progress",
        "child",
        "foreign",
        "golden",
        "kinds",
        "lazy",
        "npz",
        "packages",
        "splits",
        "startup",
        "stopping",
        "streams",
        "tables",
        "version",
        "written",
    )
}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Full names of the modules a file imports; with `top_level`, only those it imports when it is imported."""
    tree = ast.parse(path.read_text())
    lazy: set[ast.AST] = set()
    if top_level:
        for node in ast.walk(tree):
            body = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if body or typing_only:
                lazy.update(ast.walk(node))
    found = set()
    for node in ast.walk(tree):
        if node in lazy:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def packages(path: Path, *, top_level: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, top_level=top_level)}


#: The rooms from the ground up: each may import itself and what stands before it.
FLOORS = [
    "ground", "gmconv", "gmconv.cropping", "gmconv.train", "runtime", "runtime.runners", "runtime.report",
    "runtime.parity", "runtime.benchmark", "runtime.evaluate", "runtime.serve", "export.graph", "export.precision",
    "export.crop", "export.onnx", "export.tensorrt", "export.triton", "export",
]  # fmt: skip
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in sources(room)
}


def floor(module: str) -> str:
    """The room a module stands in; the roots of gmconv and runtime are rooms too."""
    if module in GROUND:
        return "ground"
    return max((room for room in FLOORS if f"{module}.".startswith(f"{room}.")), key=len)


def arrows(module: str) -> set[str]:
    """Modules of ours that a module imports, late and type-only imports included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in full.values()}
    return found & set(MODULES) - {module}


def test_no_import_leads_back_to_where_it_began() -> None:
    TopologicalSorter({module: arrows(module) for module in MODULES}).prepare()  # raises CycleError


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_no_arrow_runs_up(module: str) -> None:
    here = FLOORS.index(floor(module))
    assert [name for name in arrows(module) if FLOORS.index(floor(name)) > here] == []


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_have_names_of_their_own(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert path.name.startswith("__") or not path.name.startswith("_")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [
        n.name
        for n in functions
        if (n.end_lineno or 0) - n.lineno + 1 - len((ast.get_docstring(n) or "").split("\n")) > 60
    ]
    assert long == []
    many = [n.name for n in functions if len(_parameters(n)) > 8]
    assert many == [], "an option object says it in one"


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    found = function.args
    names = [argument.arg for argument in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@pytest.mark.parametrize("path", sources("gmconv"), ids=str)
def test_gmconv_imports_neither_runtime_nor_export(path: Path) -> None:
    assert not packages(path) & {"runtime", "export"}


@pytest.mark.parametrize("path", sources("runtime"), ids=str)
def test_runtime_imports_no_export_and_gmconv_and_torch_in_the_torch_runner_alone(path: Path) -> None:
    assert "export" not in packages(path)
    if path.relative_to(ROOT) != TORCH_RUNNER:
        assert "torch" not in packages(path)
        above = {name for name in imports(path) if name.split(".")[0] == "gmconv"} - GROUND
        assert not above


@pytest.mark.parametrize("room", ROOMS)
def test_tensorrt_and_cuda_have_one_door_each(room: str) -> None:
    for path in sources(room):
        name = str(path.relative_to(ROOT))
        if name != "runtime/trt.py":
            assert not packages(path) & {"tensorrt", "tensorrt_rtx"}, name
        if name != "runtime/cuda/__init__.py":
            assert not packages(path) & {"pycuda", "cuda"}, name


@pytest.mark.parametrize("room", ROOMS)
def test_optional_packages_are_imported_when_used_not_when_loaded(room: str) -> None:
    for path in sources(room):
        assert not packages(path, top_level=True) & {"torchvision", "timm", "sklearn", "tensorrt", "pycuda"}, path


def test_every_room_is_a_folder_of_the_house_and_no_other_code_is_at_top_level() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert {f for f in folders if not f.startswith(".")} <= {"gmconv", "export", "runtime", "tests", "docker"}


def test_there_is_a_command_line_for_each_public_command() -> None:
    public = {"gmconv.train", "export.onnx", "export.tensorrt", "export.triton", "export.precision"}
    public |= {"runtime.parity", "runtime.benchmark", "runtime.evaluate", "runtime.serve"}
    assert public <= set(COMMANDS)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_quick_and_needs_no_heavy_import(module: str) -> None:
    script = (
        "import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'sklearn', 'matplotlib', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # its own seconds, not those of what runs beside it
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip().endswith("[]"), done.stderr
        assert "--help" in done.stdout
        if best < 0.3:
            break
    assert best < 1.0, "the README promises 0.3 s; three times that is a heavy import, not a noisy machine"
