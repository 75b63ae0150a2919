"""The house rules of the source tree, kept by tests: who may import whom, sizes, and what never runs on a run path."""

import ast
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = [
    {"launcher"},
    {"data_tools"},
    {"megascale.export"},
    {"megascale.train"},
    {"megascale.checkpoint"},
    {"megascale.engine"},
    {"megascale.model", "megascale.optim", "megascale.observe"},
    {"megascale.parallel", "megascale.data"},
    {"megascale.config"},
    {"megascale.errors"},
]
"""Top first. A file imports only from its own package and from layers below it."""

ONLY_IN = {
    "deepspeed": {"megascale.engine"},
    "wandb": {"megascale.observe"},
    "webdataset": {"megascale.data", "data_tools"},
}
TORCH_FREE = {"megascale.errors", "megascale.config", "launcher", "data_tools"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
SAFE_YAML_LOADERS = {"StrictLoader", "yaml.SafeLoader"}


def sources() -> list[Path]:
    return sorted(path for top in ("megascale", "launcher", "data_tools") for path in (ROOT / top).rglob("*.py"))


def python_files() -> list[Path]:
    return sources() + sorted(path for top in ("tests", "bench") for path in (ROOT / top).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to."""
    packages = [package for layer in LAYERS for package in layer]
    return next((p for p in packages if module == p or module.startswith(p + ".")), None)


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, `from a import b` counted as both a and a.b."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def level(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def test_every_file_belongs_to_a_layer():
    strays = [path for path in sources() if package_of(module_name(path)) is None]
    assert [str(path.relative_to(ROOT)) for path in strays] == ["megascale/__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_only(path):
    own = package_of(module_name(path))
    for imported in imports(path):
        other = package_of(imported)
        if own and other and other != own:
            assert level(other) > level(own), f"{path.name} in {own} imports {imported}, which is not below it"


def test_no_import_cycle_between_files():
    modules = {module_name(path): path for path in sources()}
    edges = {name: {i for i in imports(path) if i in modules and i != name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for imported in sorted(edges[name]):
                visit(imported, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_special_packages_stay_in_their_layer(path):
    own = package_of(module_name(path))
    roots = {imported.split(".")[0] for imported in imports(path)}
    for package, homes in ONLY_IN.items():
        assert package not in roots or own in homes, f"{path.name} imports {package}; only {homes} may"
    assert own not in TORCH_FREE or "torch" not in roots, f"{path.name} imports torch, which {own} does without"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path):
    assert not imports(path) & FORBIDDEN_IMPORTS
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN_CALLS, f"{path}:{node.lineno}: {called}"
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("shell", "False") == "False", f"{path}:{node.lineno}: shell={keywords['shell']}"
        if called == "yaml.load":
            assert keywords.get("Loader") in SAFE_YAML_LOADERS, f"{path}:{node.lineno}: unsafe YAML"


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines < 400, f"{path.name} has {num_lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length < 60, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_documented_and_hold_no_globals(path):
    module = tree(path)
    if path.name == "__init__.py":
        assert all(isinstance(node, ast.Expr) for node in module.body), f"{path}: code in __init__.py"
        return
    assert path.name != "utils.py"
    assert ast.get_docstring(module), f"{path}: no module docstring"
    globals_used = [node.lineno for node in ast.walk(module) if isinstance(node, ast.Global)]
    assert not globals_used, f"{path}:{globals_used}: global"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_and_classes_have_docstrings(path):
    if path.name == "__init__.py":
        return
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_no_path_of_a_machine_or_registry_is_committed():
    texts = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".yaml", ".toml", ".sh"} and p.is_file()]
    own = [p for p in texts if not {".venv", ".git", "runs", "data"} & set(p.relative_to(ROOT).parts)]
    assert len(own) > 50
    registry = "python" + "hosted"
    for path in own:
        assert registry not in path.read_text(encoding="utf-8"), path


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    """Caught: pytest's own default, which never looked into tests/dist."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(folders) > 5
    assert not {
        folder for folder in folders for part in folder.parts if any(fnmatch(part, pattern) for pattern in patterns)
    }
