"""Tables for narrow and wide terminals."""

import pytest
from rich.console import Console

from peft_kernels.perf.results import OURS, Row
from peft_kernels.perf.tables import FittingTable, table

CANDIDATES = (OURS, "sdpa, keys and values expanded", "torch.compile of the formula")
HEADINGS = ("time", "spread", "runs", "x ours", "% of roofline", "tokens/s", "peak MB", "kept MB", "error")


def rows():
    case = {"benchmark": "shared_cross_attention", "shape": {"N": 60, "H": 12}, "dtype": "float32", "phase": "forward"}
    figures = {"median_s": 1.234e-3, "spread": 0.12, "runs": 20, "ratio": 10.5, "error": 1e-7, "roofline_s": 1e-3}
    sizes = {
        "bytes": 10**6,
        "operations": 10**9,
        "peak_bytes": 12345678,
        "kept_bytes": 2345678,
        "items": 480,
        "item": "tokens",
    }
    return [Row(**case, candidate=candidate, **figures, **sizes) for candidate in CANDIDATES]


def shown(width: int, content) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(content)
    return captured.get()


def test_a_wide_table_has_every_column():
    text = shown(200, table(rows()))
    assert all(word in text for word in (*CANDIDATES, *HEADINGS)) and "no room" not in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_table_keeps_names_and_what_matters_and_says_what_it_leaves_out(width):
    text = shown(width, table(rows()))
    lines = text.splitlines()
    left_out = (
        " ".join(text[text.index("no room for") : text.index("roofline bound")].split())
        .removeprefix("no room for ")
        .split(", ")
    )
    assert max(map(len, lines)) <= width and "…" not in text
    assert all(candidate in text for candidate in CANDIDATES)
    heading = next(line for line in lines if "candidate" in line)
    for name in HEADINGS:
        assert (name in heading) != (name in left_out)
    assert "time" in heading and "x ours" in heading


def test_text_folds_where_no_more_columns_can_be_left_out():
    name = "scaled_dot_product_flash_attention_for_cpu_backward"
    lines = [{"operator": name, "time": "1.23 ms", "share": None}, {}, {"operator": "[bold]addmm[/bold]"}]
    text = shown(40, FittingTable(lines, ("operator",), ("share",)))
    assert max(map(len, text.splitlines())) <= 40 and name[:20] in text and "1.23 ms" in text
    assert "share" not in text  # no line has one
    addmm = next(line for line in text.splitlines() if "addmm" in line)
    assert addmm.split() == ["addmm", "-"] and "bold" not in text
