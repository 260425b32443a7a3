"""Imports go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_mm"
MODULES = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): p for p in PACKAGE.rglob("*.py")}

# A module may import from earlier layers, and within its own where `WITHIN` says so.
LAYERS = [
    ["arguments", "global_state"],
    ["reached"],
    [
        "registration",
        "seeding",
        "products",
        "distributions",
        "scatter",
        "nn",
        "pareto",
        "presence",
        "arviz_bridge",
        "columns",
        "draws",
        "memo",
        "plates",
        "reads",
        "repeatable",
        "traceable",
        "values",
        "support",
    ],
    ["batch", "fixed", "evidence", "noise", "sets"],
    ["conditionals", "posteriors", "priors", "models"],
    ["explaining"],
    ["pairs"],
    ["audit"],
    ["evaluation"],
    ["guides"],
    ["reduction"],
    ["importance"],
    ["estimators", "proposals", "bridge"],
    ["terms", "bounds", "stacking", "subsampling", "foreign"],
    ["objective"],
    ["objectives"],
]
WITHIN = {
    ("distributions", "products"),
    ("scatter", "distributions"),
    ("scatter", "presence"),
    ("traceable", "draws"),
    ("sets", "batch"),
    ("posteriors", "conditionals"),
    ("bounds", "terms"),
    ("stacking", "terms"),
    ("foreign", "terms"),
    ("foreign", "stacking"),
}
# Beside the layers: exactly what each may import.
BESIDE = {
    "likelihood": {"audit", "batch", "evaluation", "evidence", "importance", "pairs", "proposals", "seeding", "values"},
    "annealed": {"audit", "batch", "bridge", "evaluation", "evidence", "likelihood", "pairs", "predictive", "seeding"},
    "predictive": {
        "batch",
        "evaluation",
        "likelihood",
        "pairs",
        "plates",
        "presence",
        "proposals",
        "seeding",
        "distributions",
    },
    "calibration": {
        "audit",
        "batch",
        "evaluation",
        "importance",
        "pairs",
        "predictive",
        "presence",
        "reduction",
        "seeding",
    },
    "tables": set(),
    "gap": {"batch", "bounds", "evidence", "importance", "objective", "objectives", "pairs", "seeding"},
    "gradients": {"batch", "reached", "registration", "seeding", "stepping"},
    "stepping": {"batch", "fixed", "reached", "registration", "seeding", "traceable"},
    "tracing": {"batch", "registration", "seeding", "stepping"},
    "captured": set(),
    "draw_order": set(),
    "changes": {"reached"},
    "compiled": {
        "batch",
        "captured",
        "changes",
        "draw_order",
        "naming",
        "nn",
        "probing",
        "seeding",
        "stepping",
        "tracing",
        "training_arguments",
    },
    "feeding": {"batch"},
    "causes": {"batch"},
    "finite": {"batch", "causes", "seeding", "stepping"},
    "probing": {"batch", "causes", "explaining", "finite", "global_state", "reached", "stepping"},
    "training_arguments": {"batch"},
    "naming": {"stepping"},
    "unreached": {"batch", "stepping"},
    "diagnostics": {
        "audit",
        "batch",
        "bounds",
        "comparison",
        "export",
        "estimators",
        "evaluation",
        "evidence",
        "gap",
        "gradients",
        "likelihood",
        "objective",
        "pairs",
        "reached",
        "tables",
        "training_arguments",
        "unreached",
    },
    "comparison": {"arviz_bridge", "batch", "evaluation", "evidence", "likelihood", "tables"},
    "export": {"arviz_bridge", "batch", "evaluation", "evidence", "pairs", "predictive", "seeding"},
    "storage": set(),
    "fingerprint": {"batch"},
    "saving": {"arguments", "storage"},
    "checkpoint": {"arguments", "batch", "fingerprint", "reached", "seeding", "stepping", "storage"},
    "train": {
        "audit",
        "batch",
        "checkpoint",
        "compiled",
        "explaining",
        "feeding",
        "finite",
        "naming",
        "probing",
        "reached",
        "registration",
        "seeding",
        "stepping",
        "storage",
        "training_arguments",
        "unreached",
        "tracing",
    },
    "datasets": {"batch", "seeding"},
    "metrics": {"audit", "batch", "evaluation", "guides", "likelihood", "predictive", "pairs", "importance", "seeding"},
    "plots": None,
    "protocols": {"audit", "batch", "evaluation", "evidence", "likelihood", "seeding"},
    "recipes": None,
    "family": None,
    "studies": None,
    "reproduce": None,
    "report": None,
    "console": set(),
    "runs": {"checkpoint", "saving", "storage", "train"},
    "cli": None,
    "__init__": None,
}  # None: anything but its own superiors
LEAVES = {
    "cli": set(),
    "plots": {"cli"},
    "metrics": {"cli", "family", "studies", "__init__"},
    "report": {"cli", "family", "reproduce"},
    "reproduce": {"cli"},
    "family": {"reproduce"},
    "studies": {"reproduce"},
    "recipes": {"cli", "family", "report", "reproduce", "studies", "__init__"},
}
APART = ["models", "guides", "objectives", "likelihood"]


def imports(name):
    """The package's modules that a module imports, anywhere in it, by their names without the package."""
    found, parts = set(), name.split(".")
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("pyro_mm").lstrip(".") for a in node.names if a.name.split(".")[0] == "pyro_mm"
            }
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = parts[: len(parts) - node.level] + module
            elif module[:1] == ["pyro_mm"]:
                base = module[1:]
            else:
                continue
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                found.add(whole if whole in MODULES or f"{whole}.__init__" in MODULES else ".".join(base) or "__init__")
    return found - {name}


def top(name):
    return name.split(".")[0]


IMPORTS = {name: {top(x) for x in imports(name)} - {top(name)} for name in MODULES}


def test_the_reader_of_imports_sees_them():
    """Known imports of known modules, absolute, relative, of a module and of a name."""
    assert {"batch", "pairs", "evidence", "proposals", "importance"} <= IMPORTS["likelihood"]
    assert "foreign" in IMPORTS["objective"] and {"batch", "registration"} <= IMPORTS["models.linear_gaussian"]
    assert {"conditionals", "batch", "train"} <= IMPORTS["__init__"]


def test_every_module_has_its_place():
    placed = {m for layer in LAYERS for m in layer} | set(BESIDE)
    assert {top(m) for m in MODULES} <= placed


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    if top(name) in BESIDE:
        allowed = BESIDE[top(name)]
        if allowed is not None:
            assert IMPORTS[name] <= allowed | set(LAYERS[0])
        return
    (level,) = [i for i, layer in enumerate(LAYERS) if top(name) in layer]
    earlier = {m for layer in LAYERS[:level] for m in layer}
    assert {m for m in IMPORTS[name] if (top(name), m) not in WITHIN} <= earlier


def test_nothing_imports_the_outer_leaves():
    for name, found in IMPORTS.items():
        for leaf, importers in LEAVES.items():
            assert leaf not in found or top(name) in importers, (name, leaf)
        assert "datasets" not in found or top(name) in ("__init__", "cli", "recipes", "reproduce", "studies"), name
    assert not IMPORTS["__init__"] & {"cli", "plots"}


def test_stories_guides_objectives_and_likelihoods_know_nothing_of_each_other():
    for one in APART:
        for name in (m for m in MODULES if top(m) == one):
            assert not IMPORTS[name] & set(APART), name
    for name in ("likelihood", "predictive"):
        assert not IMPORTS[name] & {"objective", "estimators", "models", "guides", "objectives"}
    assert not IMPORTS["train"] & {"models", "guides", "objectives", "objective", "estimators", "likelihood"}
