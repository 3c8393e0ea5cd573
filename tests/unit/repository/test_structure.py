"""scripts/structure reports each broken rule with its place, and counts correctly."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "structure"


@pytest.fixture(scope="module")
def structure() -> Any:
    spec = spec_from_loader("structure", SourceFileLoader("structure", str(SCRIPT)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(root: Path, **texts: str) -> Path:
    """Write each text to a module of services/loraserve/a, or to the folder that the name begins with."""
    for name, text in texts.items():
        folder = "kernels/loraserve/kernels" if name.startswith("kernel") else "services/loraserve/a"
        path = root / folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_circles_are_found_through_other_modules(structure: Any, tmp_path: Path) -> None:
    write(
        tmp_path,
        one="import loraserve.a.two\n",
        two="try:\n    from loraserve.a import three\nexcept ImportError:\n    pass\n",
        three="from loraserve.a.one import x\n",
        four="from loraserve.a.one import x\n",
    )
    broken = structure.broken_rules(structure.read_modules(tmp_path))
    assert broken == ["import circle: loraserve.a.one, loraserve.a.three, loraserve.a.two"]


def test_imports_for_type_checkers_and_in_functions_make_no_circle(structure: Any, tmp_path: Path) -> None:
    write(
        tmp_path,
        one="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from loraserve.a.two import x\n",
        two="from loraserve.a import one\nfrom loraserve.a.three import y\n",
        three="def f():\n    import loraserve.a.two\n",
    )
    assert structure.broken_rules(structure.read_modules(tmp_path)) == []


def test_a_class_name_in_two_modules_is_named_with_both(structure: Any, tmp_path: Path) -> None:
    write(tmp_path, one="class Same: ...\n", two="class Same: ...\nclass Other: ...\n")
    broken = structure.broken_rules(structure.read_modules(tmp_path))
    assert broken == ["class Same is in services/loraserve/a/one.py and services/loraserve/a/two.py"]


def test_functions_have_six_parameters_at_most_but_in_kernels(structure: Any, tmp_path: Path) -> None:
    seven = "def f(a, b, c, d, *, e, f, g): ...\n"
    write(
        tmp_path,
        one="class A:\n    def f(self, a, b, c, d, e, f, *g, **h): ...\n",
        two=f"import a\n{seven}",
        kernel=seven,
    )
    broken = structure.broken_rules(structure.read_modules(tmp_path))
    assert broken == ["services/loraserve/a/two.py:2: f has 7 parameters, 6 at most"]


def test_figures_count_lines_tests_and_assertions(structure: Any, tmp_path: Path) -> None:
    write(tmp_path, one="def f():\n    return 1\n\n\ndef g(): ...\n")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_it.py").write_text("def test_one():\n    assert 1\n    with pytest.raises(E):\n        f()\n")
    figures = dict(structure.figures(structure.read_modules(tmp_path), tmp_path))
    assert (figures["product lines"], figures["modules"], figures["functions"]) == (5, 1, 2)
    assert (figures["test functions"], figures["test assertions"]) == (1, 2)
    assert figures["lines of a function"] == "median 1.5, 90% up to 2, largest 2"
