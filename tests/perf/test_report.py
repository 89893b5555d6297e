"""The page and the README's figures, from rows made here and from those of the repository."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from peft_kernels.cli.commands import app
from peft_kernels.ops import __all__ as operators
from peft_kernels.perf.measure import Peaks
from peft_kernels.perf.report import load, page, picture, updated
from peft_kernels.perf.report.bars import RatioAxis
from peft_kernels.perf.report.methods import METHODS
from peft_kernels.perf.report.sections import SECTIONS, section
from peft_kernels.perf.results import OURS, Results, Row

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
ROOT = Path(__file__).parents[2]
NASTY = '<script>alert("&")</script>'
MACHINE = {
    "versions": {"torch": "2.0"},
    "system": "Linux x86_64",
    "cpu": "A CPU",
    "cpu_capability": "AVX2",
    "cores": 4,
    "threads": 2,
    "gpus": [],
}
ATTENTION = {
    "benchmark": "shared_cross_attention",
    "dtype": "float32",
    "phase": "forward",
    "bytes": 4000,
    "operations": 9000,
    "roofline_s": 1e-3,
}


def attention(streams: int, **ratios) -> list[Row]:
    """Rows of one problem: ours takes 2 ms, every other candidate its ratio times that."""
    shape = {"b": 2, "M": streams, "n": 64}
    return [
        Row(**ATTENTION, shape=shape, candidate=candidate, median_s=2e-3 * r, runs=9, spread=0.1, ratio=r)
        for candidate, r in {OURS: 1.0, **ratios}.items()
    ]


def results(rows, date="2026-03-05T10:00:00+00:00", **fields) -> Results:
    what = {
        "device": "cpu",
        "device_name": "A CPU",
        "peaks": {"float32": Peaks(4e6, 9e6)},
        "command": "bench",
        **fields,
    }
    return Results(environment={**MACHINE, "date": date}, rows=tuple(rows), **what)


@pytest.fixture
def folder(tmp_path):
    def write(**files):
        for name, content in files.items():
            content.write(tmp_path / "results" / f"{name}.json")
        return tmp_path / "results"

    return write


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.S))


def report(*args, code=0):
    result = CliRunner().invoke(app, ["report", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_pages_show_what_the_result_files_give():
    machines = load([ROOT / "benchmarks/results"])
    for path in (
        ROOT / "README.md",
        *(ROOT / f"docs/{method}.md" for method in ("pid", "dept", "pasta", "dect", "ytuning")),
    ):
        text = path.read_text()
        assert text == updated(text, machines), f"{path.name}: run `make figures`"


def test_picture_shows_what_the_result_files_give():
    """Compare the ranges in words: coordinates and markup depend on matplotlib's version."""
    kept = ElementTree.fromstring((ROOT / "docs/images/methods.svg").read_text())
    made = ElementTree.fromstring(picture(load([ROOT / "benchmarks/results"])))
    name = "{http://www.w3.org/2000/svg}desc"
    assert kept.find(name).text == made.find(name).text, "run `make figures`"
    labels = [text.text for text in kept.iter("{http://www.w3.org/2000/svg}text")]
    assert all(line.rpartition(": ")[0] in labels for line in made.find(name).text.splitlines())


def test_picture_has_the_losses_and_both_themes(folder):
    made = folder(cpu=results([*attention(4, eager=0.5), *attention(8, eager=3.0)]))
    svg = picture(load([made]))
    description = ElementTree.fromstring(svg).find("{http://www.w3.org/2000/svg}desc").text
    assert svg == picture(load([made])) and description == "PiD's operators against the best alternative: 0.50 to 3.00x"
    assert "#fe00" not in svg and "prefers-color-scheme: dark" in svg and "var(--panel)" in svg


def test_methods_in_one_table(folder):
    rows = [*attention(4, eager=0.5, **{"sdpa expanded": 12.0}), *attention(8, eager=3.0)]
    end_to_end = [
        replace(row, benchmark="pid_generate", kept_bytes=8 if row.candidate == OURS else 80)
        for row in attention(4, stock=0.98)
    ]
    text = updated(f"<!-- figures: methods -->\n{END}", load([folder(cpu=results([*rows, *end_to_end]))]))
    assert (
        "| `python benchmarks/pid_generate.py`: over stock 0.98x | 10.0x | 0.50 to 3.00x; slower in 1 of 2 cases |"
        in text
    )
    assert "Measured on **A CPU**, 4 cores, AVX2, 2026-03-05." in text and "No GPU was measured." in text


def test_every_operator_belongs_to_a_method():
    assert {
        operator
        for operator in operators
        if not section(operator).about.startswith(tuple(method.name for method in METHODS))
    } == set()


def test_known_names_are_those_of_the_rows():
    """A baseline that is quoted or excluded by name would vanish silently once a benchmark renames it."""
    candidates: dict[str, set[str]] = {}
    for machine in load([ROOT / "benchmarks/results"]):
        for case in machine.cases:
            candidates.setdefault(case.of.benchmark, set()).update(row.candidate for row in case.rows)
    for entry in SECTIONS.values():
        named = {entry.published, *entry.other_work} - {None}
        assert named <= candidates.get(entry.benchmark, named), entry.benchmark
    assert set(operators) <= set(SECTIONS)


def test_page_without_a_gpu_says_so_and_with_one_does_not(folder):
    rows = attention(4, eager=3.0)
    cpu = page(load([folder(cpu=results(rows))]))
    assert "No GPU was measured." in text_of(cpu) and "No GPU was measured." in updated(
        f"{BEGIN}\n{END}", load([folder()])
    )
    both = load([folder(gpu=results(rows, device="cuda", device_name="A GPU"))])
    assert "No GPU was measured." not in text_of(page(both)) + updated(f"{BEGIN}\n{END}", both)
    assert [machine.name for machine in both] == ["A GPU", "A CPU"]


def test_page_is_self_contained_and_the_same_again(folder):
    made = folder(cpu=results([*attention(4, eager=3.0), *attention(8, eager=5.0), *attention(16, eager=9.0)]))
    html = page(load([made]))
    assert html == page(load([made]))
    assert not re.search(r"https?:|//[a-z]|<(script|link|iframe|img)|@import|url\((?!#)", html)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert len(drawings) == 2  # the roofline, and time over M
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        own = set(re.findall(r'\bid="([^"]+)"', drawing))
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', drawing)) <= own
        assert "var(--series-0)" in drawing and "#fe00" not in drawing


def test_page_escapes_what_files_say(folder):
    rows = [replace(row, benchmark=NASTY, variant=NASTY) for row in attention(4, **{NASTY: 2.0})]
    rows += [replace(row, benchmark=NASTY) for n in (4, 8) for row in attention(n, **{NASTY: 2.0})]
    rows.append(replace(rows[1], candidate="gone", median_s=None, ratio=None, missing=NASTY))
    html = page(load([folder(cpu=results(rows, device_name=NASTY, command=NASTY))]))
    assert "<script" not in html and "&lt;script&gt;" in html
    ElementTree.fromstring(
        picture(
            load(
                [folder(cpu=results([replace(row, benchmark="pid_generate") for row in attention(4, **{NASTY: 2.0})]))]
            )
        )
    )


def test_a_baseline_that_was_not_run_is_shown_with_its_reason(folder):
    rows = [
        *attention(4, eager=3.0),
        Row(**ATTENTION, shape={"b": 2, "M": 4, "n": 64}, candidate="flex", missing="CUDA only"),
    ]
    text = text_of(page(load([folder(cpu=results(rows))])))
    assert "flex : CUDA only 1 of 1 case" in text and "not run: CUDA only" in text


def test_rows_alone_drive_the_page(folder):
    """An unknown benchmark, and ours without other candidates."""
    text = text_of(
        page(
            load(
                [
                    folder(
                        new=results(
                            [
                                Row(
                                    benchmark="brand new",
                                    shape={},
                                    dtype="int8",
                                    phase="forward",
                                    candidate=OURS,
                                    median_s=1.0,
                                )
                            ]
                        )
                    )
                ]
            )
        )
    )
    assert "brand new" in text and "no baseline was measured beside it" in text


def test_ours_is_compared_with_the_strongest_alternative(folder):
    rows = attention(4, eager=3.0, **{"fold + sdpa": 1.5, "ours, cpp": 0.5})
    [machine] = load([folder(cpu=results(rows))])
    [case] = machine.cases
    assert case.strongest.candidate == "fold + sdpa" and case.ours.share_of_roofline == 0.5
    stock = [replace(row, benchmark="pasta_layer") for row in attention(4, stock=0.3, official=1.2)]
    [machine] = load([folder(cpu=results(stock))])
    assert machine.cases[0].strongest.candidate == "official"


def test_the_newest_measurement_of_a_thing_counts(folder):
    old, new = results(attention(4, eager=3.0)), results(attention(4, eager=2.0), date="2026-03-06T00:00:00+00:00")
    [machine] = load([folder(a_new=new, b_old=old)])
    assert [case.strongest.ratio for case in machine.cases] == [2.0]


def test_figures_are_ranges_over_the_shapes(folder):
    rows = [*attention(4, eager=3.0, **{"sdpa expanded": 12.0}), *attention(8, eager=1.25, **{"sdpa expanded": 20.0})]
    text = updated(f"before {BEGIN}\nold {END} after", load([folder(cpu=results(rows))]))
    assert (
        text.startswith(f"before {BEGIN}\n**A CPU**, 4 cores, AVX2, 2026-03-05:")
        and text.endswith(f"{END} after")
        and "old" not in text
    )
    assert "| forward, 2 shapes | 1.25 to 3.00x; 12.0 to 20.0x; 50% |" in text
    assert "`peft-kernels bench shared_cross_attention`" in text


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END}{BEGIN}\n", f"{BEGIN}\n{END}{BEGIN}\n{END}"])
def test_figures_need_their_markers(text, folder):
    with pytest.raises(ValueError, match="expected one <!-- figures -->"):
        updated(text, load([folder(cpu=results(attention(4, eager=3.0)))]))


def test_figures_of_named_benchmarks(folder):
    machines = load([folder(cpu=results(attention(4, eager=3.0)))])
    assert "3.00x" in updated(f"<!-- figures: shared_cross_attention -->\n{END}", machines)
    with pytest.raises(ValueError, match="no results of label_logits; there are shared_cross_attention"):
        updated(f"<!-- figures: label_logits -->\n{END}", machines)


def test_half_and_twice_are_as_far_from_one():
    axis = RatioAxis([0.5, 2.0])
    assert [axis.at(ratio) for ratio in (0.5, 1, 2, 9)] == [0, 50, 100, 100]
    assert RatioAxis([1e-6, 1e6]).at(1e-9) == 0 and RatioAxis([]).at(1) == 50


def test_command_writes_the_page_and_the_figures(folder, tmp_path):
    made, readme = folder(cpu=results(attention(4, eager=3.0))), tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    report(made, "--out", tmp_path / "page.html", "--figures", readme)
    assert (tmp_path / "page.html").read_text() == page(load([made])) and "3.00x" in readme.read_text()
    report(made, "--picture", tmp_path / "methods.svg")
    assert (tmp_path / "methods.svg").read_text() == picture(load([made]))


def test_command_refuses_what_it_cannot_read(folder, tmp_path):
    assert "found none" in report(tmp_path, code=2)
    (tmp_path / "old.json").write_text('{"environment": {}, "results": []}')
    assert "expected results of schema 2, got None" in report(tmp_path, code=2)
