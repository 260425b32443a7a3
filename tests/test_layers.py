"""Imports go one way, by a table of folders; private names of torch and Pyro have their homes."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_mm"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}

# The contract: an entry at the top of the package, and the entries that it may import. Everything may import `utils`.
MAY_IMPORT = {
    "utils": [],
    "handlers": [],
    "distributions": [],
    "nn": [],
    "conditionals": ["distributions"],
    "batch": ["distributions", "handlers"],
    "datasets": ["batch"],
    "models": ["batch", "conditionals", "distributions", "handlers"],
    "posteriors": ["batch", "conditionals", "distributions", "handlers"],
    "scoring": ["batch", "conditionals", "distributions", "handlers"],
    "estimators": ["batch", "distributions", "scoring"],
    "objectives": ["batch", "distributions", "estimators", "handlers", "scoring"],
    "sampling": ["batch", "distributions", "handlers", "scoring"],
    "evidence": ["batch", "distributions", "sampling", "scoring"],
    "metrics": ["batch", "distributions", "evidence", "handlers", "sampling", "scoring"],
    "training": ["batch", "conditionals", "distributions", "handlers", "nn", "scoring"],
    "diagnostics": ["batch", "estimators", "evidence", "objectives", "sampling", "scoring", "training"],
    "recipes": ["batch", "conditionals", "estimators", "models", "nn", "objectives", "posteriors"],
    "plots": ["batch", "diagnostics", "evidence", "metrics", "sampling", "training"],
    "experiments": [
        "batch", "conditionals", "datasets", "diagnostics", "distributions", "estimators", "evidence", "metrics",
        "models", "nn", "objectives", "posteriors", "recipes", "sampling", "training",
    ],
    "cli": [
        "batch", "datasets", "diagnostics", "estimators", "evidence", "experiments", "metrics", "objectives", "plots",
        "recipes", "sampling", "training",
    ],
}  # fmt: skip

MOST_ENTRIES = 22
MOST_LEVELS = 9

# Code that relies on private names of torch or Pyro; each has a contract test that says what it relies on.
HOMES_OF_PRIVATE_NAMES = ["handlers.", "training.compile", "training.tracing"]


def imported(name: str, top_level_only: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (module, imported name) of the imports of the package's own modules, without "pyro_mm"."""
    path = FILES[name]
    package = name.split(".")[:-1]
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyro_mm":
                    yield alias.name.removeprefix("pyro_mm").lstrip("."), ""
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *module]
            elif module[:1] == ["pyro_mm"]:
                base = module[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                if whole in FILES or f"{whole}.__init__" in FILES:
                    yield whole, ""
                else:
                    yield ".".join(base), alias.name


def entry(module: str) -> str:
    """Return the entry at the top of the package that a module lies in."""
    return module.split(".")[0] or "__init__"


@cache
def graph() -> dict[str, set[str]]:
    """Return for every entry those that it imports."""
    found: dict[str, set[str]] = {}
    for name in FILES:
        if entry(name) == "__init__":
            continue
        others = {entry(module) for module, _ in imported(name)} - {entry(name), "__init__"}
        found.setdefault(entry(name), set()).update(others)
    return found


def levels(edges: dict[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest path of imports below each entry. Raises a ValueError for a circle."""
    found: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> int:
        if name in path:
            raise ValueError(f"a circle of imports: {' -> '.join([*path, name])}")
        if name not in found:
            found[name] = 1 + max((visit(other, (*path, name)) for other in edges[name]), default=0)
        return found[name]

    for name in edges:
        visit(name, ())
    return found


def test_imports_of_every_form_are_read():
    assert ("batch.batch", "Batch") in set(imported("evidence.likelihood"))
    assert ("metrics", "") in set(imported("cli.figures"))  # within a function
    assert ("experiments.studies.study", "Study") in set(imported("experiments.studies.__init__"))


def test_a_circle_of_imports_is_found():
    with pytest.raises(ValueError, match="a -> b -> a"):
        levels({"a": {"b"}, "b": {"a"}})


def test_every_entry_has_its_place():
    assert set(graph()) == set(MAY_IMPORT)
    assert len(MAY_IMPORT) <= MOST_ENTRIES


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_an_entry_imports_what_it_may(name):
    assert graph()[name] <= {*MAY_IMPORT[name], "utils"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_contract_allows_nothing_that_is_not_used(name):
    assert set(MAY_IMPORT[name]) <= graph()[name]


def test_there_are_few_levels_and_no_circle():
    found = levels(graph())
    for level in sorted(set(found.values())):
        print(level, ", ".join(sorted(name for name in found if found[name] == level)))
    assert max(found.values()) <= MOST_LEVELS


def test_there_is_no_circle_among_modules():
    edges: dict[str, set[str]] = {}
    for name in FILES:
        if name != "__init__":
            modules = {module for module, _ in imported(name, top_level_only=True)}
            edges[name] = {f"{m}.__init__" if f"{m}.__init__" in FILES else m for m in modules} - {name, "", "__init__"}
    assert levels(edges)


@pytest.mark.parametrize("name", sorted(FILES))
def test_private_names_of_torch_and_pyro_stay_at_home(name):
    if any(name == home or (home.endswith(".") and name.startswith(home)) for home in HOMES_OF_PRIVATE_NAMES):
        return
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] in ("torch", "pyro"):
                assert not any(part.startswith("_") for part in parts), module


def test_no_test_imports_another():
    """Helpers that several tests share are in tests/support/."""
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    assert len(tests) > 100
    for path in tests:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            parts = [part for name in (module, *names) for part in name.split(".")]
            taken = [part for part in parts if part.startswith("test_") or part == "conftest"]
            assert not taken, f"{path.name}, line {node.lineno}: imports {', '.join(taken)}"
