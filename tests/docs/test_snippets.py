"""Every block of Python in the README and in the documentation runs.

The blocks of a page share names; the first block starts without any.
"""

from doctest import NORMALIZE_WHITESPACE
from pathlib import Path

import pytest
import torch
from snippet_names import NAMES
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCKS = Sybil([PythonCodeBlockParser(doctest_optionflags=NORMALIZE_WHITESPACE)])


@pytest.fixture(autouse=True)
def own_folder_and_one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page, tmp_path):
    document = BLOCKS.parse(page)
    document.namespace.update(NAMES.get(page.stem, lambda folder: {})(tmp_path))
    for block in document:
        block.evaluate()


def test_readme():
    """Each block runs alone."""
    blocks = list(BLOCKS.parse(ROOT / "README.md"))
    assert blocks
    for block in blocks:
        block.namespace.clear()
        block.evaluate()
