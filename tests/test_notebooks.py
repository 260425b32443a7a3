"""Every notebook runs from top to bottom in its short form, is easy to read, and was saved with its outputs.

One is run by a kernel, as its reader would. The others are run cell by cell in IPython, in processes forked from
one that has imported torch and Pyro already: a kernel for each would spend its time on imports.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.support.notebooks import code_cells, outcomes_of_cells

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
BY_A_KERNEL = NOTEBOOKS / "09_your_own_data.ipynb"

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install '.[test]'")
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
each_other = pytest.mark.parametrize(
    "path", [path for path in PATHS if path != BY_A_KERNEL], ids=lambda path: path.stem
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Ask for the short form, and let processes elsewhere, which leave nothing in the checkout, find the package."""
    monkeypatch.setenv("PYRO_MM_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=":")


@each_other
def test_every_cell_runs(path, tmp_path):
    pytest.importorskip("IPython", reason="IPython is not installed: pip install '.[test]'")
    outcomes = outcomes_of_cells(path, tmp_path)
    errors, warnings = zip(*outcomes, strict=True)
    assert not any(errors), "".join(errors)
    assert not any(warnings), "".join(warnings)  # a reader would see them
    assert len(outcomes) == len(code_cells(path))  # also if the process has died


def test_a_failing_cell_is_seen(tmp_path):
    pytest.importorskip("IPython", reason="IPython is not installed: pip install '.[test]'")
    cells = ["x = 1", "import warnings; warnings.warn('take care')", "1 / (x - 1)", "x"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    fine, warned, failed = outcomes_of_cells(tmp_path / "failing.ipynb", tmp_path)  # the fourth cell is not run
    assert fine == ("", "")
    assert warned[0] == "" and "take care" in warned[1]
    assert "ZeroDivisionError" in failed[0]


def test_a_notebook_runs_in_a_kernel(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[test]'")
    notebook = nbformat.read(BY_A_KERNEL, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert_complete(notebook)


@each_notebook
def test_outputs_are_saved_and_small(path):
    assert path.stat().st_size < 600_000
    assert_complete(nbformat.read(path, as_version=4))


def assert_complete(notebook):
    """Every cell has run, in order and from the first; there are outputs, no errors and nothing on standard error."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)


@each_notebook
def test_first_cell_asks_a_question(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert first.source.count("?") == 1


@each_notebook
def test_cells_are_short(path):
    long = {len(source.splitlines()): source.splitlines()[0] for source in code_cells(path)}
    assert max(long) <= 25, f"a cell of {max(long)} lines begins with {long[max(long)]!r}"


@each_notebook
def test_nothing_private_is_used(path):
    used = [name for source in code_cells(path) for name in private_names(source)]
    assert not used


def private_names(source: str) -> list[str]:
    """Return the attributes, imports and keywords in a cell that begin with one underscore."""
    without_magics = re.sub(r"^%.*$", "", source, flags=re.M)
    found = []
    for node in ast.walk(ast.parse(without_magics)):
        if isinstance(node, ast.Attribute):
            found.append(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
            found += [part for module in modules for part in module.split(".")]
        elif isinstance(node, ast.keyword):
            found.append(node.arg or "")
    return [name for name in found if name.startswith("_") and not name.startswith("__")]


@pytest.mark.parametrize(
    "source", ["x._hidden", "from torch import _C", "import torch._dynamo", "from pyro_mm._a import b", "f(_x=1)"]
)
def test_private_names_are_found(source):
    assert private_names(f"%matplotlib inline\n{source}\ny.__class__")
