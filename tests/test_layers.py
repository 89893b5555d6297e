"""Imports go downwards only: a layer imports itself and the layers below it; an operator's implementations never import
each other.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "peft_kernels"
METHODS = ("pid", "dept", "pasta", "dect", "ytuning")
# bottom first; modules on one line do not import each other, except for those in MAY
LAYERS = [["version"], ["ops"], ["hf"], list(METHODS), ["perf"], ["demo"], ["cli"], ["__main__"]]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# PEFT's registry must know both tuners as soon as PEFT is imported
MAY = {("hf.peft_method", "dept"), ("hf.peft_method", "pasta")}
IMPLEMENTATIONS = ("reference", "cpp", "cuda", "triton", "triton_kernels")


def imports():
    """Yield (importing module, imported module), both without the package's name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        package = parts[:-1]
        module = package if parts[-1] == "__init__" else parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    full = [*base, alias.name]
                    target = PACKAGE.joinpath(*full)
                    found = full if target.with_suffix(".py").exists() or target.is_dir() else base
                    yield ".".join(module), ".".join(found)


IMPORTS = sorted(set(imports()))


def test_layers_import_downwards_only():
    wrong = []
    for importer, imported in IMPORTS:
        above, below = importer.split(".")[0], imported.split(".")[0]
        # the package itself names the public modules
        if not above or not below or above == below or (importer, below) in MAY:
            continue
        if LEVEL[below] >= LEVEL[above]:
            wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_every_module_has_a_layer():
    found = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(LEVEL)


def test_implementations_do_not_meet():
    operators = [path.name for path in (PACKAGE / "ops").iterdir() if (path / "reference.py").exists()]
    assert operators
    wrong = []
    for importer, imported in IMPORTS:
        a, b = importer.split("."), imported.split(".")
        if (
            len(a) == len(b) == 3
            and a[:2] == b[:2]
            and a[1] in operators
            and a[2] in IMPLEMENTATIONS
            and b[2] in IMPLEMENTATIONS
        ):
            kinds = {a[2].removesuffix("_kernels"), b[2].removesuffix("_kernels")}
            if len(kinds) > 1:
                wrong.append(f"{importer} imports {imported}")
    assert not wrong


def test_no_cycles():
    """Only imports that run when a module is loaded count."""
    edges: dict[str, set[str]] = {}
    for importer, imported in IMPORTS:
        within = f"{imported}.".startswith(f"{importer}.") or f"{importer}.".startswith(f"{imported}.")
        if not within and (importer, imported.split(".")[0]) not in MAY:
            edges.setdefault(importer, set()).add(imported)
    TopologicalSorter(edges).prepare()
