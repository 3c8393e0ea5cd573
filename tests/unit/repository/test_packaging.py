"""What the wheel holds and what it requires."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGED = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
OWN = "loraserve"


def test_the_wheel_holds_no_test_helpers_and_no_benchmarks() -> None:
    assert PACKAGED == ["common/loraserve", "kernels/loraserve", "services/loraserve"]
    shipped = {path.relative_to(ROOT).parts[2] for package in PACKAGED for path in (ROOT / package).iterdir()}
    assert not {"testing", "benchmarks"} & shipped
    modules = [path.relative_to(ROOT) for package in PACKAGED for path in (ROOT / package).rglob("*.py")]
    assert modules
    assert [str(path) for path in modules if re.search(r"test|bench", path.as_posix())] == []


def test_every_imported_distribution_is_declared() -> None:
    declared = {_name(requirement) for requirement in _requirements()}
    distributions = packages_distributions()
    missing: dict[str, str] = {}
    for package in PACKAGED:
        for path in (ROOT / package).rglob("*.py"):
            for module in _imported(path):
                if module == OWN or module in sys.stdlib_module_names:
                    continue
                names = {_name(name) for name in distributions.get(module, [module])}
                if not names & declared:
                    missing[module] = str(path.relative_to(ROOT))
    assert missing == {}


def _requirements() -> list[str]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *(each for name in extras if name != "dev" for each in extras[name])]


def _name(requirement: str) -> str:
    """Return the normalised name of a requirement or distribution."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
