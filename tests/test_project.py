"""What is written in several places agrees: commands, versions, dependencies, and what a source archive holds."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path

import pyro_mm

ROOT = Path(__file__).parents[1]
INSTALL = "python -m pip install -c constraints.txt '.[test]'"
TEST = "python -m pytest -n 2"


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def pyproject():
    return tomllib.loads(read("pyproject.toml"))


def test_readme_has_the_commands():
    lines = read("README.md").splitlines()
    assert "python -m pip install -c constraints.txt . && pyro-mm train digits" in lines
    assert f"{INSTALL} && {TEST}" in lines


def test_ci_runs_the_command_of_the_readme():
    lines = read(".ci/run").splitlines()
    assert INSTALL in lines
    assert TEST in lines
    assert lines.index(INSTALL) < lines.index(TEST)


def test_the_version_is_the_same_in_every_place():
    version = pyproject()["project"]["version"]
    assert importlib.metadata.version("pyro-mm") == version
    assert pyro_mm.__version__ == version
    assert re.search(r"^version: (\S+)$", read("CITATION.cff"), re.M)[1] == version
    assert re.search(r"^## \[(\d\S*?)\]", read("CHANGELOG.md"), re.M)[1] == version


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins():
    """Return name -> the versions that constraints.txt pins, one for each range of Python versions."""
    found = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; python_version [<>=]+ \"3\.12\")?", line).groups()
            found.setdefault(canonical(name), []).append(version)
    return found


def requirements():
    """Return name -> lowest version, of the dependencies and of all extras."""
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    return {canonical(re.match(r"[\w.-]+", r)[0]): r.split(">=")[1] for r in wanted if not r.startswith("pyro-mm[")}


def numbers(version):
    return [int(part) for part in version.split(".")]


def test_every_dependency_is_pinned():
    assert requirements().keys() <= pins().keys()
    assert {name for name, versions in pins().items() if len(versions) > 1} == {"arviz"}


def test_every_pin_is_at_least_the_lowest_version():
    for name, lowest in requirements().items():
        assert all(numbers(version) >= numbers(lowest) for version in pins()[name]), name


def test_the_development_extra_holds_that_of_the_tests():
    assert "pyro-mm[test]" in pyproject()["project"]["optional-dependencies"]["dev"]


def test_the_conda_environment_installs_what_the_tests_need_under_the_pins():
    lines = [line.strip().removeprefix("- ") for line in read("environment.yml").splitlines()]
    assert lines.index("-c constraints.txt") < lines.index("-e .[test]")
    (python,) = (line.removeprefix("python=") for line in lines if line.startswith("python="))
    lowest, above = re.fullmatch(r">=([\d.]+),<([\d.]+)", pyproject()["project"]["requires-python"]).groups()
    assert numbers(lowest) <= numbers(python) < numbers(above)
    assert len([line for line in lines if re.match(r"[\w-]+[=<>]", line)]) == 1  # nothing but Python has a version


def test_every_library_that_is_imported_is_a_dependency():
    distributions = {"PIL": "pillow", "pyro": "pyro-ppl", "sklearn": "scikit-learn"}
    of_arviz = {"arviz_stats", "xarray"}
    found = set()
    for path in (ROOT / "pyro_mm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    if_installed = {
        "IPython",
        "graphviz",
        "lightning_fabric",
        "pandas",
    }  # loaded at use, with an error of ours where it is not there
    found -= {*sys.stdlib_module_names, *of_arviz, *if_installed, "pyro_mm"}
    declared = {canonical(re.match(r"[\w.-]+", r)[0]) for r in pyproject()["project"]["dependencies"]}
    assert {canonical(distributions.get(name, name)) for name in found} <= declared


def test_a_source_archive_holds_all_that_its_files_refer_to():
    included = pyproject()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/pyro_mm", "/tests", "/notebooks", "/docs", "/constraints.txt", "/environment.yml"} <= {*included}
    assert all("*" in path or (ROOT / path.removeprefix("/")).exists() for path in included)


def test_the_lowest_versions_are_installed_and_tested_as_the_newest_pinned_ones():
    script = read("tests/lowest.sh")
    assert "--resolution" in script and "lowest-direct" in script and "'.[test]'" in script
    assert "tests/lowest.sh" in read("CONTRIBUTING.md") and "lowest.sh" not in read(".ci/run")


def test_every_dependency_has_a_lowest_version():
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+", requirement) for requirement in wanted)


def test_types_are_checked_strictly_but_for_two_settings():
    settings = pyproject()["tool"]["mypy"]
    assert settings["strict"] is True and settings["files"] == ["pyro_mm"]
    weaker = {"disallow_subclassing_any", "disallow_untyped_calls"}  # --allow-subclassing-any --allow-untyped-calls
    assert {name for name, value in settings.items() if value is False} == weaker
    assert all(set(override) == {"module", "follow_imports"} for override in settings["overrides"])
    assert "mypy" in read(".ci/run").splitlines()


def test_the_wheel_holds_the_package_and_nothing_else():
    """``.ci/run`` installs by a wheel, whose list of files this reads; an editable install is judged by the folder."""
    assert pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["pyro_mm"]}
    of_folder = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_mm").rglob("*") if path.is_file()}
    installed = importlib.metadata.distribution("pyro-mm")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    is_editable = origin.get("dir_info", {}).get("editable", False)
    of_wheel = of_folder if is_editable else {file.as_posix() for file in installed.files}

    found = {name for name in of_wheel if ".dist-info/" not in name and not name.endswith((".pyc", "/bin/pyro-mm"))}
    assert {name.partition("/")[0] for name in found} == {"pyro_mm"}
    assert {name for name in found if not name.endswith(".py")} == {"pyro_mm/py.typed"}
    assert not [name for name in found if re.search(r"(^|/)(tests?|test_\w+\.py|conftest\.py|data)(/|$)", name)]
