"""Documentation that cannot rot: what is generated is up to date, links lead somewhere, the languages say the same."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_generated_blocks_are_up_to_date() -> None:
    wanted = runpy.run_path(str(ROOT / "docs" / "generate.py"))["wanted"]()
    stale = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run python docs/generate.py for {stale}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_both_readmes_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]

    assert commands("README.md") == commands("README.zh-CN.md")
    assert len(commands("README.md")) >= 4


def test_every_method_and_family_is_in_the_readme() -> None:
    from trimtab.arch import FAMILIES
    from trimtab.methods import METHODS

    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(f"[`{method}`]" in text for method in METHODS)
        assert all(family in text for family in FAMILIES)


def test_nothing_speaks_of_one_machine() -> None:
    """No absolute paths of a developer's machine in texts that are published."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|Users|tmp)/\w", text), page
