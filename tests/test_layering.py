"""Imports point one way: the tree reads like the sentence in the README."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxcert"

# Each room may import from itself and from the rooms named here.
MODEL = {"errors", "model", "floats", "pytrees"}
WORDS = MODEL | {"sets", "specs", "certificate"}
GRAPH = {"blocks", "graph", "idioms", "rows", "tracing"}
MAY_IMPORT = {
    "errors": set(),
    "pytrees": set(),
    "model": {"errors"},
    "floats": {"model"},
    "sets": MODEL,
    "specs": MODEL | {"sets"},
    "certificate": MODEL | {"sets"},
    "blocks": set(),
    "graph": MODEL | {"blocks"},
    "idioms": MODEL | {"graph"},
    "rows": MODEL | {"blocks", "graph"},
    "tracing": MODEL | {"blocks", "graph", "idioms", "rows"},
    "bounds": WORDS | GRAPH,
    "lipschitz": WORDS | GRAPH | {"bounds"},
    "nn": WORDS | {"blocks", "lipschitz"},
    "smoothing": WORDS | GRAPH,
    "evaluate": WORDS | {"smoothing"},
    "attacks": WORDS,
    "exact": WORDS | GRAPH | {"bounds", "attacks", "io"},
    "training": WORDS | GRAPH | {"bounds", "lipschitz", "smoothing"},
    "io": WORDS | GRAPH,
    "cli": WORDS | {"exact", "io"},
    "__main__": {"cli"},
}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(parts):
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = room(path.relative_to(PACKAGE).parts)
    used = {m.split(".")[1] for m in imported_modules(path) if m.startswith("jaxcert.")}
    assert used <= MAY_IMPORT[here] | {here}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_public_jax(path):
    for module in imported_modules(path):
        assert not module.startswith(("jax._src", "torch"))
        if module.startswith("jax.extend"):
            assert path.name == "graph.py"


def test_import_is_light():
    code = (
        "import jaxcert, sys; heavy = {'flax', 'scipy.stats', 'matplotlib', 'rich', 'optax'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
