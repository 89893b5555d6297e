"""The commands of ``peft-kernels``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..ops.tuned import KERNELS

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class AnyDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Phase(str, Enum):
    forward = "forward"
    backward = "backward"
    both = "both"


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
    _check(device)
    if data is not None and (input is not None or prompts is not None):
        raise typer.BadParameter("dialogues bring their own inputs and prompts: leave --input and --prompts out", param_hint="--data")
    workload = chosen(model, tokenizer, input, prompts, data, input_tokens, limit, batch_size)
    agree = run(workload, model, getattr(torch, dtype.value), device.value, new_tokens, repeats, out, console)
    raise typer.Exit(0 if agree else 1)


@app.command()
def bench(
    operators: Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="Operators, as in peft_kernels.ops. Without one: all.")] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[list[AnyDtype] | None, typer.Option(help="May be repeated. Without it: float32 and bfloat16.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help='Sizes in place of the default shapes, "B=16,L=256,...", of exactly one OP. May be repeated.')
    ] = None,
    phase: Annotated[Phase, typer.Option(help="backward: forward and backward together.")] = Phase.both,
    repeats: Annotated[int, typer.Option(help="Timed runs of each way, or more where they are short.", min=2)] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes and fewer repetitions of what is short.")] = False,
    against: Annotated[str | None, typer.Option(help="A git revision of this package, whose operators are timed beside.", metavar="REF")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for operators.json and operators.csv. Without it: results/<device>.", file_okay=False)
    ] = None,
):
    """Every operator against every baseline: checked against float64, timed turn by turn, held against the floor of this machine."""
    from .operators_command import asked, run
    from .revision import found

    _check(device)
    console = Console()
    try:
        things = asked(operators or [], [d.value for d in dtype or []], shapes or [], phase.value, quick, console)
        checkout = None if against is None else found(against)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(0 if run(things, device.value, repeats, quick, out, console, checkout) else 1)


def _check(device: Device):
    import torch

    if device == Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA or ROCm device here", param_hint="--device")


Operator = Enum("Operator", {name: name for name in KERNELS}, type=str)


@app.command()
def tune(
    operators: Annotated[list[Operator] | None, typer.Argument(metavar="[OP]...", help="Without one: all.")] = None,
    dtype: Annotated[list[Dtype], typer.Option(help="Of the tensors; bfloat16 stands for float16 too.")] = (Dtype.float32, Dtype.bfloat16),
    out: Annotated[
        Path | None, typer.Option(help="Write here, not where launches read; what is there of other kernels stays.", dir_okay=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the nearest neighbours of the shipped options.")] = False,
):
    """Measure the launch options of the Triton kernels on this GPU, and keep those that are at least 3 % faster than the shipped ones.

    Block sizes, warps and stages are tried around the shipped table, checked against its results, and timed side by side as CUDA graphs.
    What is faster goes into a JSON file that later processes read at their first launch: in PEFT_KERNELS_CACHE, XDG_CACHE_HOME/peft_kernels
    or ~/.cache/peft_kernels, for this GPU, this version of Triton and of peft_kernels. PEFT_KERNELS_TUNED=0 turns it off, `info` says what
    is in use. Sums may be added in another order than with the shipped options. Nothing is ever tuned at a call.

    The kernels in CUDA C++, which "auto" takes where they are built, have their launch constants compiled in and are not tuned.
    """
    import torch

    from .tune import run

    run([one.value for one in operators or ()], [getattr(torch, one.value) for one in dtype], out, quick, Console())


class Method(str, Enum):
    pid = "pid"
    dept = "dept"
    pasta = "pasta"
    dect = "dect"
    ytuning = "ytuning"


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Argument(help="A folder, or t5-base, bert-base, roberta-base, gpt2 and the like with random weights, or a hub id."),
    ],
    method: Annotated[Method | None, typer.Option(help="What is swapped in. Encoder-decoder models need not say: pid.")] = None,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="INTS", help="Inputs of a batch. Several values, as 1,2,4 or repeated, make a sweep with a plot.")
    ] = None,
    streams: Annotated[list[str] | None, typer.Option(metavar="INTS", help="pid: prompts of every input; a sweep likewise.")] = None,
    length: Annotated[list[str] | None, typer.Option(metavar="INTS", help="Tokens of an input; a sweep likewise.")] = None,
    new_tokens: Annotated[list[str] | None, typer.Option(metavar="INTS", help="pid: tokens generated, or learned, per prompt; likewise.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    repeats: Annotated[int | None, typer.Option(help="Timed runs of each way; 5, with --quick 2.", min=1)] = None,
    train: Annotated[bool, typer.Option("--train", help="A training step in place of inference.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes where no option names one, two runs: does it work at all.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON, plots and traces; else results/DEVICE.", file_okay=False)] = None,
):
    """A model end to end, stock and with a method's kernels: throughput, time to first token, peak memory, time by operator.

    Both ways run turn by turn in one process, and what they say is compared: a disagreement in float32 fails. Chrome traces are written too.
    """
    import torch

    from .profile import run

    sizes = {"batch": batch, "streams": streams, "length": length, "new_tokens": new_tokens}
    chosen = {"dtype": getattr(torch, dtype.value), "device": device.value, "repeats": repeats, "train": train, "quick": quick, "out": out}
    agree = run(model, None if method is None else method.value, sizes, **chosen, console=Console())
    raise typer.Exit(0 if agree else 1)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Where result files are. Without: benchmarks/results.", exists=True, file_okay=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page to write. Without, and without --figures: report.html.", dir_okay=False)] = None,
    figures: Annotated[
        list[Path] | None,
        typer.Option(help="A Markdown file whose figures are written anew, between its markers. May be repeated.", exists=True, dir_okay=False),
    ] = None,
):
    """Result files as one self-contained HTML page, or as the figures of the README and of docs/."""
    from .report import load, page, updated

    try:
        machines = load(folders or [Path("benchmarks/results")])
        for path in figures or []:
            path.write_text(updated(path.read_text(encoding="utf-8"), machines), encoding="utf-8")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if out is not None or not figures:
        (out or Path("report.html")).write_text(page(machines), encoding="utf-8")
