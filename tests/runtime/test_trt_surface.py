"""Surface conformity: do the names we use exist in every TensorRT we support?

The real Python bindings of TensorRT 10.13, 10.16 and 11.4 are downloaded (1.3 MB each) and loaded, each in a process of
its own, against a stub of the nine C symbols that they link to; TensorRT-RTX is loaded as installed. Every attribute,
enum member, keyword and overridden method that our source uses is collected from that source and looked up in each.

This checks names, not behaviour: a name that exists may still do something else. Functions whose name begins with
`rtx_` are TensorRT-RTX's alone and are looked up there only.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [
        ROOT / "runtime/trt.py",
        ROOT / "runtime/runners/tensorrt.py",
        *(ROOT / f"runtime/runners/{name}.py" for name in ("lane", "engine", "runtime_cache")),
        ROOT / "export/tensorrt/__main__.py",
        *(ROOT / "export/tensorrt").glob("*.py"),
    ]
)
OWN = {"self", "options"}  # receivers that are ours: this object, BuildOptions
VERSIONS = ("10.13", "10.16", "11.4")
STUB = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
"""
# Run beside the bindings: prints what is missing, and every name that TensorRT's classes have.
CHECK = """
import importlib, json, sys
module, uses = importlib.import_module(sys.argv[1]), json.load(sys.stdin)
missing = []
for use in uses:
    owner = module
    for part in [p for p in use["owner"].split(".") if p]:
        owner = getattr(owner, part, None)
    found = getattr(owner, use["name"], None) if owner is not None else None
    absent = owner is None or not hasattr(owner, use["name"])
    documented = getattr(found, "__doc__", None) or ""
    if absent or any(f"{k}:" not in documented for k in use["keywords"]):
        missing.append(use)
classes = [c for c in vars(module).values() if isinstance(c, type) and not hasattr(c, "__members__")]
names = sorted({n for c in classes for n in dir(c) if not n.startswith("_") and "_" in n})
print(json.dumps({"version": module.__version__, "missing": missing, "names": names}))
"""


@dataclass(frozen=True)
class Use:
    """`name` of `owner` ("" is the module, "Builder" a class of it), with the keywords it is called with."""

    owner: str
    name: str
    keywords: tuple[str, ...]
    where: str
    rtx_only: bool


class Collector(ast.NodeVisitor):
    """Collects uses of the module (`api`) and of what is annotated with its names (`trt.Builder`).

    `unresolved` holds attribute accesses whose receiver has no annotation that says what it is.
    """

    def __init__(self, path: str, own_names: bool) -> None:
        self.path = path
        self.own_names = own_names  # runtime/trt.py itself annotates with the bare names
        self.uses: list[Use] = []
        self.unresolved: list[tuple[str, str]] = []
        self.scopes: list[dict[str, str]] = [{}]
        self.functions: list[str] = []
        self.calls: dict[ast.expr, ast.Call] = {}

    def annotated_class(self, annotation: ast.expr | None) -> str | None:
        """The TensorRT class in "trt.X", "trt.X | None" or "list[trt.X]"."""
        for node in ast.walk(annotation) if annotation is not None else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trt":
                if node.attr not in {"Log", "LogRecord", "Flavor"}:
                    return node.attr
            elif self.own_names and isinstance(node, ast.Name) and node.id in IMPORTED:
                return node.id
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if (owner := self.module_path(base)) is not None:
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("__"):
                        self.add(owner, item.name, item)
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope: dict[str, str] = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if found := self.annotated_class(argument.annotation):
                scope[argument.arg] = found
        self.scopes.append(scope)
        self.functions.append(node.name)
        self.generic_visit(node)
        self.functions.pop()
        self.scopes.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if found := self.annotated_class(node.annotation):
            self.bind(node.target, found)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        if found := self.type_of(node.iter):
            self.bind(node.target, found)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        for generator in node.generators:  # before the element, which uses their targets
            self.visit_comprehension(generator)
        self.visit(node.elt)

    def visit_Call(self, node: ast.Call) -> None:
        self.calls[node.func] = node
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.module_path(node.value)
        if owner is None:
            owner = self.type_of(node.value)
        if owner is not None:
            if node.attr not in {"__members__", "__init__", "name"} or owner == "":
                self.add(owner, node.attr, node)
        elif not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            self.unresolved.append((node.attr, f"{self.path}:{node.lineno}: {ast.unparse(node)}"))
        self.generic_visit(node)

    def module_path(self, node: ast.expr) -> str | None:
        """ "" for `api` itself, "BuilderFlag" for `api.BuilderFlag`; None for anything else."""
        text = ast.unparse(node)
        for root in ("self._api", "api"):
            if text == root:
                return ""
            if text.startswith(root + ".") and text.replace(".", "").replace("_", "").isalnum():
                return text[len(root) + 1 :]
        return None

    def type_of(self, node: ast.expr) -> str | None:
        text = ast.unparse(node)
        return next((scope[text] for scope in reversed(self.scopes) if text in scope), None)

    def bind(self, target: ast.expr, owner: str) -> None:
        text = ast.unparse(target)
        # What a method annotates on self holds in the whole file.
        (self.scopes[0] if text.startswith("self.") else self.scopes[-1])[text] = owner

    def add(self, owner: str, name: str, node: ast.expr | ast.stmt) -> None:
        call = self.calls.get(node) if isinstance(node, ast.expr) else None
        keywords = tuple(k.arg for k in call.keywords if k.arg) if call else ()
        rtx_only = any(function.startswith("rtx_") for function in self.functions)
        self.uses.append(Use(owner, name, keywords, f"{self.path}:{node.lineno}", rtx_only))


def type_checking_imports() -> set[str]:
    tree = ast.parse((ROOT / "runtime/trt.py").read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "tensorrt"]
    return {alias.name for node in nodes for alias in node.names}


IMPORTED = type_checking_imports()


def collect(source: str, path: str) -> Collector:
    collector = Collector(path, own_names=path.endswith("runtime/trt.py"))
    # Twice: a method may use what a later one annotates on self.
    tree = ast.parse(source)
    collector.visit(tree)
    collector.uses.clear()
    collector.unresolved.clear()
    collector.visit(tree)
    return collector


@pytest.fixture(scope="module")
def ours() -> list[Collector]:
    return [collect(path.read_text(), str(path.relative_to(ROOT))) for path in SOURCES]


@pytest.fixture(scope="session")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the unpacked bindings per version, and "stub": the folder of the stub libraries."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gmconv-deploy" / "bindings"
    work = tmp_path_factory.mktemp("bindings")
    folders = {}
    for version in VERSIONS:
        wheel = next(iter(sorted(cache.glob(f"{sys.implementation.cache_tag}/{version}/*.whl"))), None)
        if wheel is None:
            target = cache / str(sys.implementation.cache_tag) / version
            fetched = work / f"wheel-{version}"
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            done = subprocess.run(
                [*command, "-d", str(fetched), f"tensorrt-cu13-bindings=={version}.*"], capture_output=True, text=True
            )
            wheels = list(fetched.glob("*.whl"))
            if done.returncode or not wheels:
                pytest.fail(f"pip cannot fetch the bindings of TensorRT {version}:\n{done.stderr}", pytrace=False)
            target.mkdir(parents=True, exist_ok=True)
            wheel = wheels[0].replace(target / wheels[0].name) if same_device(fetched, target) else wheels[0]
        folders[version] = work / version
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folders[version])
    stub = work / "stub"
    stub.mkdir()
    (stub / "stub.c").write_text(STUB)
    for major in (10, 11):
        for library in ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin"):
            target_library = stub / f"{library}.so.{major}"
            subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target_library), str(stub / "stub.c")], check=True)
    folders["stub"] = stub
    return folders


def same_device(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def look_up(uses: list[Use], version: str, bindings: dict[str, Path] | None) -> dict[str, object]:
    """Load one version of the bindings in a process of its own and look the uses up in it."""
    environment = dict(os.environ)
    module = "tensorrt_rtx"
    if bindings is not None:
        module = "tensorrt_bindings"
        environment |= {"LD_LIBRARY_PATH": str(bindings["stub"]), "PYTHONPATH": str(bindings[version])}
    done = subprocess.run(
        [sys.executable, "-c", CHECK, module],
        input=json.dumps([asdict(use) for use in uses]),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, f"the bindings of TensorRT {version} do not load:\n{done.stderr}"
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_we_use_exists_in_tensorrt(version: str, ours: list[Collector], bindings: dict[str, Path]) -> None:
    uses = [use for collector in ours for use in collector.uses if not use.rtx_only]
    answer = look_up(uses, version, bindings)
    assert str(answer["version"]).startswith(version)
    assert answer["missing"] == []


def test_every_name_we_use_exists_in_tensorrt_rtx(ours: list[Collector]) -> None:
    uses = [use for collector in ours for use in collector.uses]
    assert look_up(uses, "rtx", None)["missing"] == []
    assert any(use.rtx_only for use in uses)


def test_the_collector_finds_what_the_source_uses(ours: list[Collector]) -> None:
    """A collection of nothing would pass every look-up."""
    uses = {(use.owner, use.name) for collector in ours for use in collector.uses}
    assert len(uses) > 60
    for known in [
        ("", "Builder"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("BuilderFlag", "TF32"),
        ("Builder", "build_serialized_network"),
        ("IBuilderConfig", "progress_monitor"),
        ("IProgressMonitor", "step_complete"),
        ("ILogger", "log"),
        ("OnnxParser", "parse_from_file"),
        ("ParserError", "node_name"),
        ("Runtime", "deserialize_cuda_engine"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("IExecutionContext", "execute_async_v3"),
        ("IProfiler", "report_layer_time"),
        ("ITensor", "get_dimension_name"),
    ]:
        assert known in uses


def test_nothing_of_tensorrt_is_used_through_a_name_without_a_type(ours: list[Collector]) -> None:
    """An attribute that only TensorRT's classes have, on a receiver that no annotation explains, would go unchecked."""
    answer = look_up([], "rtx", None)
    tensorrt_names = set(answer["names"])  # type: ignore[call-overload]
    untyped = [where for collector in ours for name, where in collector.unresolved if name in tensorrt_names]
    assert untyped == []


@pytest.mark.parametrize(
    ("source", "gone_in"),
    [
        ("def f(builder: trt.Builder): builder.make_engine()", {"10.13", "11.4"}),
        ("def f(api): api.BuilderFlag.FP16", {"11.4"}),
        ("def f(engine: trt.ICudaEngine | None): engine.device_memory_size", {"11.4"}),
        ("def f(parser: trt.OnnxParser): parser.parse(model=b'', path_to='')", {"10.13", "11.4"}),
        ("def f(api):\n class M(api.IProgressMonitor):\n  def phase_begin(self): ...", {"10.13", "11.4"}),
    ],
)
def test_a_name_that_a_version_lacks_is_found_out(source: str, gone_in: set[str], bindings: dict[str, Path]) -> None:
    uses = collect(source, "planted.py").uses
    assert uses
    for version in ("10.13", "11.4"):
        missing = look_up(uses, version, bindings)["missing"]
        assert bool(missing) == (version in gone_in), (version, missing)
