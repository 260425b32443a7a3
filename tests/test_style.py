"""What CONTRIBUTING asks of functions and docstrings, as far as a program can tell."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import pyro_mm as mm

PACKAGE = Path(__file__).parents[1] / "pyro_mm"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

MOST_LINES = 80
MOST_PARAMETERS = 10
# Entry points whose parameters are a user's choices; everything else takes a value object in the place of many.
ENTRY_POINTS = {
    "annealed_importance", "bidirectional", "class_probabilities", "compare", "cross_modal_coherence", "fit",
    "generate", "log_conditional", "log_marginal", "posterior_draws", "reproduce", "sample_quality", "train",
}  # fmt: skip
QUESTIONS = re.compile(r"(What|Which|Why|How|Whether|Where)\b")
PUBLIC_MODULES = [
    mm.conditionals, mm.datasets, mm.distributions, mm.metrics, mm.models, mm.nn, mm.objectives, mm.posteriors,
    mm.priors, mm.protocols, mm.recipes, mm,
]  # fmt: skip


def functions(path):
    """Yield the functions of a file, methods and inner ones among them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of_code(node):
    """Return the number of lines of a function, its docstring not counted."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        lines -= first.end_lineno - first.lineno + 1
    return lines


def parameters(node):
    """Return the number of parameters of a function, ``self`` not counted."""
    args = node.args
    names = [arg.arg for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]]
    return len([n for n in names if n not in ("self", "cls")]) + bool(args.vararg) + bool(args.kwarg)


def documented():
    """Return name and object of everything public that is a class or a function."""
    found = []
    for module in PUBLIC_MODULES:
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isroutine(thing):
                found.append((f"{module.__name__}.{name}", thing))
    return found


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short_and_take_few_parameters(name):
    for node in functions(FILES[name]):
        assert lines_of_code(node) <= MOST_LINES, node.name
        assert parameters(node) <= MOST_PARAMETERS or node.name in ENTRY_POINTS, node.name


@pytest.mark.parametrize("name", FILES)
def test_docstrings_do_not_open_with_a_question_word(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            assert not (text and QUESTIONS.match(text)), text.splitlines()[0]


@pytest.mark.parametrize("name, thing", documented())
def test_what_is_public_has_a_docstring_whose_first_sentence_is_short(name, thing):
    text = inspect.getdoc(thing)
    assert text
    first = re.split(r"(?<=[.:])(?:\s|$)", text.replace("\n", " "), maxsplit=1)[0]
    assert len(first.split()) <= 25, first


@pytest.mark.parametrize("name, thing", documented())
def test_a_public_function_of_three_parameters_documents_each(name, thing):
    signature = inspect.signature(thing)
    names = [p for p in signature.parameters if p not in ("args", "kwargs")]
    if len(names) < 3:
        return
    text = inspect.getdoc(thing)
    init = inspect.getdoc(getattr(thing, "__init__", None)) or ""
    missing = [n for n in names if not re.search(rf"\b{n}\b", text + init)]
    assert not missing, missing
    assert re.search(r"^(Args|Attributes):$", text + init, re.M) or hasattr(thing, "_fields"), "no section Args"
