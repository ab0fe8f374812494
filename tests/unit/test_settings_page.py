"""The page of all settings."""

from __future__ import annotations

from pathlib import Path

from docs.settings_page import settings_page
from torchmgmt.settings import declarations


def test_the_page_is_what_the_declarations_say(repository: Path) -> None:
    """docs/settings.md is current; if not: make docs."""
    page = (repository / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page()
    assert all(f"| `{declaration.name}` |" in page for declaration in declarations())
