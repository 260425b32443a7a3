"""What must be said alike in more than one place: the commands of the README, and the version."""

import importlib.metadata
import re
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


def test_one_version():
    version = pyproject()["project"]["version"]
    assert importlib.metadata.version("pyro-mm") == version
    assert pyro_mm.__version__ == version
    assert re.search(r"^version: (\S+)$", read("CITATION.cff"), re.M)[1] == version
    assert re.search(r"^## \[(\d\S*?)\]", read("CHANGELOG.md"), re.M)[1] == version


def test_every_dependency_is_pinned():
    canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()  # noqa: E731
    pins = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; python_version [<>=]+ \"3\.12\")?", line).groups()
            pins.setdefault(canonical(name), []).append(version)
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["dev"]]
    names = {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted} - {"pyro-mm"}
    assert names <= pins.keys()
    assert {name for name, versions in pins.items() if len(versions) > 1} == {"arviz"}


def test_the_lowest_versions_are_installed_and_tested_as_the_newest_pinned_ones():
    script = read("tests/lowest.sh")
    assert "--resolution" in script and "lowest-direct" in script and "'.[test]'" in script
    assert "tests/lowest.sh" in read("CONTRIBUTING.md") and "lowest.sh" not in read(".ci/run")


def test_every_dependency_has_a_lowest_version():
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+", requirement) for requirement in wanted)
