"""The README's links lead somewhere, and the commands it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()


def test_links_lead_to_files_and_headings() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", README)}
    assert len(links) > 40
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (ROOT / link).exists(), link


def test_scripts_that_are_named_exist_and_can_be_run() -> None:
    names = set(re.findall(r"scripts/([a-z_]+)", README))
    assert {"up", "down", "test", "check", "status", "rebalance"} <= names
    for name in names - {"benches"}:
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111, name


def test_every_script_is_in_the_readme() -> None:
    scripts = {p.name for p in (ROOT / "scripts").iterdir() if p.is_file() and p.suffix == ""}
    assert {name for name in scripts if f"scripts/{name}" not in README} == set()
