"""The commands of ``peft-kernels``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


@app.callback()
def main():
    """Fused kernels for parameter-efficient adaptation: what runs here, and what it brings."""


@app.command()
def info():
    """Versions, devices, and which implementation of every operator is available here, or why not."""
    from .info import show

    show(Console())


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Encoder-decoder checkpoint, a path or a hub id. Without it: T5-base architecture, random weights.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="Text file, the document that is asked about. Without it: a text of this package.", exists=True, dir_okay=False),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line. Without it: 30 questions.", exists=True, dir_okay=False)] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="WOZ 2.0 dialogues (JSON, with ontology_en.json beside it): one prompt per slot on every last turn.", exists=True, dir_okay=False
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer, a path or a hub id. Without it: the model's; without a model: an id per word.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.", min=1)] = 10,
    input_tokens: Annotated[int, typer.Option(help="Longer inputs are cut after so many tokens.", min=1)] = 512,
    limit: Annotated[int, typer.Option(help="With --data: how many dialogues; 0: all.", min=0)] = 16,
    batch_size: Annotated[int, typer.Option(help="With --data: dialogues per batch.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Timed runs of the two decoder methods; the slow prompt-in-encoder runs once.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the JSON.", file_okay=False)] = Path("results/demo"),
):
    """Ask many things of one text in three ways, check that the tokens agree, and compare time and memory.

    PiE: every prompt is encoded with the text, stock generate. PiD repeated: encoded once, encoder outputs repeated per prompt, stock
    generate. Ours: pid.enable and pid.generate, every input's keys and values computed and kept once.
    """
    import torch

    from .demo import run
    from .workloads import chosen

    console = Console()
    if device == Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA or ROCm device here", param_hint="--device")
    if data is not None and (input is not None or prompts is not None):
        raise typer.BadParameter("dialogues bring their own inputs and prompts: leave --input and --prompts out", param_hint="--data")
    workload = chosen(model, tokenizer, input, prompts, data, input_tokens, limit, batch_size)
    agree = run(workload, model, getattr(torch, dtype.value), device.value, new_tokens, repeats, out, console)
    raise typer.Exit(0 if agree else 1)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Where result files are. Without: benchmarks/results.", exists=True, file_okay=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write. Without, and without --readme: report.html.", dir_okay=False)] = None,
    readme: Annotated[
        Path | None, typer.Option(help="A Markdown file whose figures are to be written anew, between its markers.", exists=True, dir_okay=False)
    ] = None,
):
    """Result files as one self-contained HTML page, or as the figures of the README."""
    from .report import load, page, updated

    try:
        machines = load(folders or [Path("benchmarks/results")])
        if readme is not None:
            readme.write_text(updated(readme.read_text(encoding="utf-8"), machines), encoding="utf-8")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None or readme is None:
        (out or Path("report.html")).write_text(page(machines), encoding="utf-8")
