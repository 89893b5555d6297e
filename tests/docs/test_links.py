"""Links of the pages outside the site lead to files, and URLs are well-formed. No URL is requested."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
OUTSIDE_THE_SITE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]  # `mkdocs build --strict` follows the links inside
PAGES = [*OUTSIDE_THE_SITE, *sorted((ROOT / "docs").glob("*.md"))]


def links_of(page: Path) -> list[str]:
    inline = [
        child
        for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
        for child in token.children or []
    ]
    return [
        child.attrs["href" if child.type == "link_open" else "src"]
        for child in inline
        if child.type in ("link_open", "image")
    ]


@pytest.mark.parametrize("page", OUTSIDE_THE_SITE, ids=lambda page: page.name)
def test_relative_links(page):
    paths = [unquote(urlsplit(link).path) for link in links_of(page) if not urlsplit(link).scheme]
    assert [path for path in paths if not (page.parent / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_addresses(page):
    addresses = [urlsplit(link) for link in links_of(page) if urlsplit(link).scheme]
    assert [a.geturl() for a in addresses if a.scheme != "https" or "." not in a.netloc] == []
