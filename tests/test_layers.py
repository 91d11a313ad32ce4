"""Who may import whom, and how long a file may be, read from the sources without running them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit

ROOT = Path(lowbit.__file__).parent
# Each layer and those that it may import; the files at the root belong to the topmost.
MAY_IMPORT = {
    "ops": {"ops"},
    "quant": {"ops", "quant"},
    "cli": {"ops", "quant", "cli"},
    "nodes": {"ops", "quant", "nodes"},
    "": {"ops", "quant", "cli", "nodes", ""},
}
# The only folder that knows ComfyUI.
BOUNDARY = "nodes/host/"
HOST = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
# Aimed at are 400; beyond 500 a file holds more than one idea.
MAX_LINES = 500


def sources(root: Path = ROOT) -> Iterator[str]:
    """Yield the pack's Python files, relative to its root, without tests and hidden folders."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        outside = {"tests", "build", "benchmarks"} & set(name.parts[:1])
        if not outside and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def imports(name: str) -> Iterator[tuple[int, str, int]]:
    """Yield (dots before the name, module, line) of each import in a file, nested ones too.

    `from . import a, b` yields a and b: what is imported from a package may be its modules.
    """
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name, node.lineno) for alias in node.names)


def target(name: str, level: int, module: str) -> tuple[str, ...]:
    """Return the path, from the pack's root, of a relative import in the file `name`."""
    package = Path(name).parent.parts
    assert level - 1 <= len(package), f"{name} imports from beyond the pack"
    return package[: len(package) - (level - 1)] + tuple(module.split("."))


def layer(parts: tuple[str, ...]) -> str:
    return parts[0] if len(parts) > 1 or parts[0] in MAY_IMPORT else ""


SOURCES = list(sources())
ALL = [*SOURCES, *(f"tests/{name}" for name in sources(ROOT / "tests"))]


def test_sources_are_found():
    assert {f"{BOUNDARY}__init__.py", "__init__.py", "ops/registry.py", "quant/convert.py"} <= set(
        SOURCES
    )
    assert "tests/test_layers.py" in ALL


@pytest.mark.parametrize("name", SOURCES)
def test_layers_import_downwards_only(name):
    allowed = MAY_IMPORT[layer(Path(name).parts)]
    for level, module, line in imports(name):
        if level:
            found = layer(target(name, level, module))
            assert found in allowed, f"{name}:{line} imports {module} of layer {found or 'root'}"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_within_the_pack_are_relative_and_exist(name):
    """The host loads the pack from a folder of any name, so its own name cannot be imported."""
    for level, module, line in imports(name):
        where = f"{name}:{line} imports {module}"
        assert level or module.split(".")[0] != "lowbit", where
        if level:
            path = ROOT.joinpath(*target(name, level, module))
            # a module, a package, or a name that the package itself defines
            found = [path.with_suffix(".py"), path / "__init__.py", path.parent / "__init__.py"]
            assert any(p.is_file() for p in found), where


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.startswith(BOUNDARY)])
def test_only_the_boundary_knows_the_host(name):
    for level, module, line in imports(name):
        known = level == 0 and module.split(".")[0] in HOST
        assert not known, f"{name}:{line} imports {module}: only {BOUNDARY} may"


@pytest.mark.parametrize("name", ALL)
def test_file_is_short(name):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines, at most {MAX_LINES} are allowed"


@pytest.mark.parametrize("name", SOURCES)
def test_no_star_imports(name):
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(alias.name == "*" for node in froms for alias in node.names)


def test_modules_do_not_hide_those_of_the_standard_library_at_the_root():
    """Some loaders put the pack's folder itself on the path."""
    roots = {Path(name).parts[0].removesuffix(".py") for name in SOURCES}
    assert not roots & set(sys.stdlib_module_names) - {"__init__", "__main__"}
