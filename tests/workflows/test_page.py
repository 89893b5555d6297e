"""docs/compatibility.md has a row for each combination of the matrix."""

import re
from pathlib import Path

from combinations import FROZEN, SEQ_2_SEQ, SEQ_CLS


def test_rows_of_the_page():
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
    table = page.partition("| combination |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:] == [*SEQ_2_SEQ, *SEQ_CLS, *FROZEN]
