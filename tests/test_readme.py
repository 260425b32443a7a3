"""The Python of README and documentation runs as it is typed, and so does that of version 0.1: nothing public broke.

The text is run unchanged, on few rows, for one epoch and without a C++ compiler, so that it takes seconds.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import torch

import pyro_mm as mm
from pyro_mm.training.compile import CompiledStep

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
VERSION_0_1 = TESTS / "support" / "readme_0_1.md"
PAGES = sorted(
    path for path in (README.parent / "docs").glob("*.md") if "```python" in path.read_text(encoding="utf-8")
)
# the one shows a function of the package as it is written there; programs of the other stand alone (test_cookbook.py)
FRAGMENTS = {"architecture.md", "cookbook.md"}

TRAIN_ROWS, TEST_ROWS = 96, 16
FEW = {
    "fit": {"epochs": 1},
    "annealed_importance": {"num_chains": 2, "temperatures": 4, "pilot_chains": 2},
    "bidirectional": {"num_chains": 2, "temperatures": 4, "pilot_chains": 2},
}


def python_blocks(path: Path) -> list[str]:
    """Return the Python blocks of a Markdown file, as they are typed."""
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def names_of_the_reader(block: str, namespace: dict) -> dict:
    """Return values for the names that a block takes from its reader's own data, such as ``images``."""
    rows = namespace["train"]
    own = {
        "images": lambda: rows["image"],
        "labels": lambda: rows["label"],
        "mask": lambda: torch.arange(rows.size) % 2 == 0,
        "parameters": lambda: [*namespace["model"].parameters(), *namespace["guide"].parameters()],
    }
    return {name: make() for name, make in own.items() if name not in namespace and re.search(rf"\b{name}\b", block)}


@pytest.fixture
def few(monkeypatch, tmp_path):
    """Data of few rows, trainings of one epoch, short chains, and steps that are traced but not compiled."""
    monkeypatch.chdir(tmp_path)
    load, build = mm.datasets.load, CompiledStep.__init__

    def load_few(*args, **options):
        train, test = load(*args, **options)
        return train[:TRAIN_ROWS], test[:TEST_ROWS]

    def build_without_compiler(self, *args, **options):
        build(self, *args, **options)
        self.backend = None

    def shortened(function, options):
        return lambda *args, **given: function(*args, **{**given, **options})

    monkeypatch.setattr(mm.datasets, "load", load_few)
    monkeypatch.setattr(CompiledStep, "__init__", build_without_compiler)
    for name, options in FEW.items():
        monkeypatch.setattr(mm, name, shortened(getattr(mm, name), options))


@cache
def run(blocks: tuple[str, ...]) -> dict:
    """Run blocks one after the other, as one script, and return the names that they leave."""
    namespace: dict = {}
    for block in blocks:
        if "train" in namespace:
            namespace.update(names_of_the_reader(block, namespace))
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", [README, VERSION_0_1], ids=["this version", "version 0.1"])
def test_the_python_of_the_readme_runs_as_typed(path, few):
    blocks = python_blocks(path)
    assert blocks
    names = run(tuple(blocks))
    assert isinstance(names["evidence"], mm.Evidence) and len(names["history"].columns["loss"]) == 1


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in FRAGMENTS], ids=lambda path: path.stem)
def test_the_python_of_the_documentation_runs_as_typed(path, few):
    run(tuple(python_blocks(path)))


def test_the_readme_is_short_and_its_code_ten_lines():
    lines = README.read_text(encoding="utf-8").splitlines()
    (block,) = python_blocks(README)
    assert len(lines) <= 150 and sum(map(bool, block.splitlines())) == 10


def test_version_0_1_had_seven_blocks():
    """The fixture is whole: it is not what a later version would like it to be."""
    blocks = python_blocks(VERSION_0_1)
    assert len(blocks) == 7 and sum(block.count("\n") for block in blocks) == 60


def test_a_broken_block_is_noticed(few):
    with pytest.raises(AttributeError, match="no_such_function"):
        run(("import pyro_mm as mm\nmm.no_such_function()\n",))
