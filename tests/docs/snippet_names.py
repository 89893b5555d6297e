"""The names that a page's snippets use without defining them.

Pages of methods have none: their first snippet runs in an empty session.
"""

from pathlib import Path

from peft_kernels.perf.results import OURS, Row, measured


def report(folder: Path) -> dict:
    """A result file as the measuring commands write it."""
    what = {"benchmark": "label_logits", "shape": {"B": 4, "H": 32}, "dtype": "float32", "phase": "forward"}
    rows = [
        Row(**what, candidate=OURS, median_s=2.0, roofline_s=1.0),
        Row(**what, candidate="another", missing="not installed"),
    ]
    path = folder / "results.json"
    measured(rows, "cpu").write(path)
    return {"path": path}


NAMES = {"report": report}
