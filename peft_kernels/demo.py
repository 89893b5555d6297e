"""One workload decoded in three ways: compares tokens, measures time and memory, and writes a table, a plot and
JSON.
"""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from torch import nn

from . import pid
from .dept.family import max_columns
from .perf import pid_baselines
from .perf.interruption import Keeping
from .perf.measure import Interrupted, Timing, cpu_model, gpus, interleaved, peak_memory
from .perf.progress import progress_bar
from .perf.results import Row, first_line, write_json
from .perf.tables import FittingTable, cells, count, table_of
from .perf.workloads import Texts, Workload, tokenizer
from .pid.families import max_positions

PIE, REPEATED, OURS = "PiE + generate", "repeated + generate", "ours"
LEGEND = (
    "PiE: every prompt encoded with the input. repeated: inputs encoded once, encoder outputs repeated per prompt."
    " time: median; spread: interquartile range over it; peak: above the loaded model; kept: cross-attention keys and"
    " values held at a time"
)


def prepare(
    texts: Texts,
    name: str | None,
    tokenizer_name: str | None,
    input_tokens: int,
    new_tokens: int,
    dtype: torch.dtype,
    device: str,
) -> tuple[Workload, nn.Module]:
    """Load the tokenizer and the model, and encode the texts.

    Raises:
        ValueError: the model or the tokenizer cannot be loaded, ``pid`` does not support the model, or the texts do not
            fit it.
    """
    if name is not None:
        with _naming("--model"):
            pid_baselines.check_kind(name)
    with _naming("--tokenizer" if tokenizer_name else "--model"):
        encoder = tokenizer(tokenizer_name or name)
    workload = texts.encoded(encoder, input_tokens)
    with _naming("--model"):
        model = pid_baselines.t5_base(dtype, device) if name is None else pid_baselines.load(name, dtype, device)
    check_fits(model, workload, new_tokens)
    return workload, model


@contextmanager
def _naming(option: str):
    """Name the option in transformers' errors: it has a different one for every kind of missing or broken file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{option}: {first_line(error)}") from error


def check_fits(model: nn.Module, workload: Workload, new_tokens: int):
    """Check that the model has positions and embeddings for the workload.

    Raises:
        ValueError: more tokens than the model has positions, or ids without an embedding.
    """
    longest, asked = max(map(len, workload.inputs)), max(map(len, workload.prompts))
    rows = model.get_input_embeddings().num_embeddings
    if (largest := max(map(max, workload.inputs + workload.prompts))) >= rows:
        raise ValueError(f"--tokenizer: it has an id of {largest}, and the model's table ends at {rows}")
    limit = max_columns(model)
    if limit is not None and longest + asked > limit:
        raise ValueError(
            f"--input-tokens: the encoder has {limit} positions, got {longest} tokens and a prompt of {asked}"
        )
    limit = max_positions(model)
    if limit is not None and 1 + asked + new_tokens > limit:
        raise ValueError(
            f"--new-tokens: the decoder has {limit} positions, got a prompt of {asked} tokens, its start and"
            f" {new_tokens} new ones"
        )


def run(
    workload: Workload,
    model: nn.Module,
    name: str | None,
    *,
    dtype: torch.dtype,
    device: str,
    new_tokens: int,
    repeats: int,
    out: Path,
    console: Console,
) -> bool:
    console.print("[bold]Many prompts, one input, three ways[/bold]")
    console.print(
        f"workload: {escape(workload.title)}; {new_tokens} new tokens each, greedy, {str(dtype).removeprefix('torch.')}"
    )
    console.print(f"on: {gpus()[0] if device == 'cuda' else f'{cpu_model()}, {torch.get_num_threads()} threads'}")
    if name is None:
        console.print(
            "[yellow]model: T5-base architecture with RANDOM weights: times and memory are real, the answers are"
            " nonsense.[/yellow]"
        )
    else:
        console.print(f"model: {escape(name)}")
    enabled = pid_baselines.twin(model)

    def asking(method, asked_model, asked=workload):
        return lambda: pid_baselines.ask(method, asked_model, asked, new_tokens, full_length=name is None)

    def first_time():
        """Includes the cost of enabling, packed weights too."""
        pid.enable(enabled)
        return asking(pid_baselines.shared, enabled)()

    first, timings = {}, {}
    with Keeping(first) as kept, progress_bar(console, 4 + 2 * repeats) as step:
        asking(
            pid_baselines.repeated,
            model,
            replace(workload, inputs=[workload.inputs[0][:16]], prompts=workload.prompts[:1]),
        )()
        first_runs = {
            PIE: asking(pid_baselines.prompt_in_encoder, model),
            REPEATED: asking(pid_baselines.repeated, model),
            OURS: first_time,
        }
        for label, function in first_runs.items():
            step(f"{label}: run 1, memory")
            first[label] = peak_memory(function, device)
        functions = {REPEATED: asking(pid_baselines.repeated, model), OURS: asking(pid_baselines.shared, enabled)}
        try:
            timings = interleaved(functions, repeats, warmup=0, device=device, notify=step)
        except Interrupted as stop:
            timings = stop.timings
            raise
    # our first run is not comparable: it includes enabling
    timings = {**{label: Timing((first[label][2],)) for label in (PIE, REPEATED) if label in first}, **timings}
    rows = [_row(label, timings, *first[label][:2]) for label in timings]
    streams = len(workload.inputs) * len(workload.prompts)
    wrong = pid_baselines.differing(first[REPEATED][0], first[OURS][0]) if OURS in first else None
    path = write_json(
        out / "demo.json",
        kept.partial,
        workload=workload.title,
        model=name or "T5-base architecture, random weights",
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        shapes={
            "input_lengths": [len(x) for x in workload.inputs],
            "prompt_lengths": [len(x) for x in workload.prompts],
            "batch_size": workload.batch_size,
            "new_tokens": new_tokens,
        },
        tokens={"streams": streams, "different": wrong},
        results=rows,
    )
    if not kept.partial:
        _plot(rows, workload.title, out / "demo.png")
    console.print(_table(rows))
    console.print(LEGEND, style="dim")
    exact = wrong is None or _verdict(console, wrong, streams, dtype)
    console.print(f"written: {path}" if kept.partial else f"written: {out / 'demo.png'}, {path}")
    kept.end(console)
    return exact


def _row(label: str, timings: dict[str, Timing], answers: pid_baselines.Answers, peak: int | None) -> dict:
    timing = timings[label]
    return {
        "method": label,
        **timing.to_json(),
        "speedup_over_pie": timings[PIE].median / timing.median,
        "speedup_over_repeated": timings[REPEATED].median / timing.median if REPEATED in timings else None,
        "peak_memory_bytes": peak,
        "cross_kv_bytes": answers.cross_bytes,
    }


def _table(rows: list[dict]) -> FittingTable:
    lines = []
    for row in rows:
        timing = {field: row[field] for field in ("median_s", "spread", "runs")}
        memory = {"peak_bytes": row["peak_memory_bytes"], "kept_bytes": row["cross_kv_bytes"]}
        case = {"benchmark": "demo", "shape": {}, "dtype": "", "phase": "generate", "candidate": row["method"]}
        ratios = {"x PiE": row["speedup_over_pie"], "x rep.": row["speedup_over_repeated"]}
        ratios = {heading: ratio and count(ratio) for heading, ratio in ratios.items()}
        lines.append({"candidate": row["method"], **cells(Row(**case, **timing, **memory)), **ratios})
    return table_of(lines, "")


def _verdict(console: Console, wrong: int, streams: int, dtype: torch.dtype) -> bool:
    """In float32 every token must agree.

    In 16 bits the summation order may decide a near-tie: differences are counted and are no failure.
    """
    if not wrong:
        console.print(f"[green]tokens: all {streams} streams of ours identical to the repeated formulation[/green]")
    elif dtype == torch.float32:
        console.print(
            f"[bold red]tokens: {wrong} of {streams} streams of ours DIFFER from the repeated formulation[/bold red]"
        )
    else:
        console.print(
            f"[yellow]tokens: {wrong} of {streams} streams differ: in 16 bits a near-tie falls either way; --dtype"
            " float32 compares exactly[/yellow]"
        )
    return not wrong or dtype != torch.float32


def _plot(rows: list[dict], title: str, path: Path):
    panels = [
        ("median_s", "seconds", 1, "time"),
        ("peak_memory_bytes", "MB", 1e6, "peak memory above the model"),
        ("cross_kv_bytes", "MB", 1e6, "cross-attention K/V"),
    ]
    panels = [panel for panel in panels if rows[0][panel[0]] is not None]
    figure = Figure((4 * len(panels), 3.4), layout="constrained")
    for axis, (key, unit, scale, name) in zip(figure.subplots(1, len(panels)), panels):
        bars = axis.bar(
            [row["method"].replace(" + ", "\n+ ") for row in rows],
            [row[key] / scale for row in rows],
            color=("#9aa5b1", "#5b7c99", "#d1603d"),
        )
        axis.bar_label(bars, [f"{row[key] / scale:,.1f}" for row in rows], fontsize=8)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel(unit)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title if len(title) <= 100 else f"{title[:97]}...", fontsize=10)
    figure.savefig(path, dpi=150)
