"""All links of the README and of the other pages have a target, and every script is described."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
SCRIPTS_PAGE = (ROOT / "scripts" / "README.md").read_text()
PAGES = sorted(
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
)


@pytest.mark.parametrize("page", PAGES or [ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text()
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", text)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (page.parent / link).exists(), link


def test_the_readme_links_to_the_code() -> None:
    assert len(re.findall(r"\]\(([^)]+)\)", README)) > 40


def test_scripts_that_are_named_exist_and_are_executable() -> None:
    names = set(re.findall(r"scripts/([a-z_]+)", README + SCRIPTS_PAGE))
    assert {"up", "down", "test", "check", "story", "simulate"} <= names
    for name in names - {"benches"}:
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111, name


def test_every_script_is_described() -> None:
    scripts = {p.name for p in (ROOT / "scripts").iterdir() if p.is_file() and p.suffix == ""}
    assert {name for name in scripts if f"]({name})" not in SCRIPTS_PAGE} == set()
