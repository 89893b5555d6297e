"""The commands of ``peft-kernels``.

Checks that do not need torch run before torch is imported, which takes over a second.
"""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..perf.files import folder_or_hub_id, text_of, with_configuration, writable_file, writable_folder
from ..version import __version__

OPERATORS = Path(__file__).parents[1] / "ops"
LARGEST = 1 << 20  # largest number accepted on the command line: anything above is a typing error

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


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


def _version(wanted: bool):
    if wanted:
        typer.echo(f"peft-kernels {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
):
    """Fused kernels for parameter-efficient adaptation: what runs here, and what it brings."""


@app.command()
def info():
    """Versions, devices, and which implementation of every operator is available here, or why not."""
    from .info import show

    show(Console())


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder-decoder checkpoint, a path or a hub id. Without it: T5-base architecture, random weights."
        ),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="Text file, the document that is asked about. Without it: a text of this package.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, one prompt a line. Without it: 30 questions.", exists=True, dir_okay=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="WOZ 2.0 dialogues (JSON, with ontology_en.json beside it): one prompt per slot on every last turn.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer, a path or a hub id. Without it: the model's; without a model: an id per word."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per prompt.", min=1, max=LARGEST)] = 10,
    input_tokens: Annotated[
        int, typer.Option(help="Longer inputs are cut after so many tokens.", min=1, max=LARGEST)
    ] = 512,
    limit: Annotated[
        int | None, typer.Option(help="With --data: how many dialogues; 0: all. Without it: 16.", min=0, max=LARGEST)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="With --data: dialogues per batch. Without it: 8.", min=1, max=LARGEST)
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(
            help="Timed runs of the two decoder methods; the slow prompt-in-encoder runs once.", min=1, max=LARGEST
        ),
    ] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the plot and the JSON.", file_okay=False)] = Path(
        "results/demo"
    ),
):
    """Ask many questions of one text in three ways, check that the tokens agree, and compare time and memory.

    PiE: every prompt is encoded with the text, stock generate. PiD repeated: encoded once, encoder outputs repeated per
    prompt, stock generate. Ours: pid.enable and pid.generate, every input's keys and values computed and kept once.
    """
    from ..perf.workloads import dialogues, texts_of

    _check(device)
    if data is not None and (input is not None or prompts is not None):
        raise typer.BadParameter(
            "dialogues bring their own inputs and prompts: leave --input and --prompts out", param_hint="--data"
        )
    for option, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and data is None:
            raise typer.BadParameter("is of --data, which is not given", param_hint=option)
    with _refusing():
        for option, name in (("--model", model), ("--tokenizer", tokenizer)):
            if name is not None:
                folder_or_hub_id(name, option)
        texts = (
            texts_of(input, prompts)
            if data is None
            else dialogues(data, 16 if limit is None else limit, batch_size or 8)
        )
        writable_folder(out)
        if model is not None:
            with_configuration(model, "--model")

    import torch

    from ..demo import prepare, run

    where = {"dtype": getattr(torch, dtype.value), "device": device.value}
    with _refusing():
        workload, loaded = prepare(texts, model, tokenizer, input_tokens, new_tokens, **where)
    agree = run(workload, loaded, model, new_tokens=new_tokens, repeats=repeats, out=out, console=Console(), **where)
    raise typer.Exit(0 if agree else 1)


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Operators, as in peft_kernels.ops. Without one: all.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[
        list[AnyDtype] | None, typer.Option(help="May be repeated. Without it: float32 and bfloat16.")
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            help='Sizes in place of the default shapes, "B=16,L=256,...", of exactly one OP. May be repeated.'
        ),
    ] = None,
    phase: Annotated[Phase, typer.Option(help="backward: forward and backward together.")] = Phase.both,
    repeats: Annotated[
        int, typer.Option(help="Timed runs of each candidate, or more where they are short.", min=2, max=LARGEST)
    ] = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes and fewer repetitions of what is short.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(help="A git revision of this package, whose operators are timed beside.", metavar="REF"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for operators.json and operators.csv. Without it: results/<device>.", file_okay=False
        ),
    ] = None,
):
    """Every operator against every baseline: checked against float64, timed turn by turn, held against the roofline of
    this machine.
    """
    _check(device)
    console = Console()
    with _refusing():
        for name in operators or []:
            if name not in (names := _operator_names()):
                raise ValueError(f"expected an operator, one of {', '.join(names)}; got {name!r}")
        if out is not None:
            writable_folder(out)

    from ..perf.bench.command import asked, run
    from ..perf.bench.revision import checkout_of
    from ..perf.results import default_folder

    with _refusing():
        cases = asked(operators or [], [d.value for d in dtype or []], shapes or [], phase.value, quick, console)
        out = out or writable_folder(default_folder(device.value))
        checkout = None if against is None else checkout_of(against)
    raise typer.Exit(0 if run(cases, device.value, repeats, quick, out, console, checkout) else 1)


@contextmanager
def _refusing() -> Iterator[None]:
    """Report an option that does not fit as one sentence, with exit status 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check(device: Device):
    if device == Device.cuda:
        import torch

        if not torch.cuda.is_available():
            raise typer.BadParameter("torch sees no CUDA or ROCm device here", param_hint="--device")


def _operator_names() -> list[str]:
    """Read ``ops.__all__`` from the source: importing ``ops`` takes longer than the reply to a mistyped name may
    take.
    """
    tree = ast.parse((OPERATORS / "__init__.py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))


Operator = Enum(
    "Operator", {path.parent.name: path.parent.name for path in sorted(OPERATORS.glob("*/tunable.py"))}, type=str
)


@app.command()
def tune(
    operators: Annotated[list[Operator] | None, typer.Argument(metavar="[OP]...", help="Without one: all.")] = None,
    dtype: Annotated[list[Dtype], typer.Option(help="Of the tensors; bfloat16 stands for float16 too.")] = (
        Dtype.float32,
        Dtype.bfloat16,
    ),
    out: Annotated[
        Path | None,
        typer.Option(help="Write here, not where launches read; what is there of other kernels stays.", dir_okay=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the nearest neighbours of the default configs.")] = False,
):
    """Measure launch configs of the Triton kernels on this GPU, and keep those that are at least 3 % faster than the
    default configs.

    Block sizes, warps and stages are tried around each default config, checked against its results, and timed side by
    side as CUDA graphs. The faster configs go into a JSON file that later processes read at their first launch: in
    PEFT_KERNELS_CACHE, XDG_CACHE_HOME/peft_kernels or ~/.cache/peft_kernels, for this GPU, this version of Triton and
    of peft_kernels. PEFT_KERNELS_TUNED=0 turns it off, `info` says which configs are in use. Sums may be added in
    another order than with the default configs. Nothing is ever tuned at a call.

    The kernels in CUDA C++, which "auto" takes where they are built, have their launch constants compiled in and are
    not tuned.
    """
    with _refusing():
        if out is not None:
            writable_file(out)

    import torch

    from ..perf.tune.search import run

    names, dtypes = [operator.value for operator in operators or ()], [getattr(torch, d.value) for d in dtype]
    run(names, dtypes, out, quick, Console())


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
        typer.Argument(
            help="A folder, or t5-base, bert-base, roberta-base, gpt2 and the like with random weights, or a hub id."
        ),
    ],
    method: Annotated[
        Method | None, typer.Option(help="What is swapped in. Encoder-decoder models need not say: pid.")
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INTS", help="Inputs of a batch. Several values, as 1,2,4 or repeated, make a sweep with a plot."
        ),
    ] = None,
    streams: Annotated[
        list[str] | None, typer.Option(metavar="INTS", help="pid: prompts of every input; a sweep likewise.")
    ] = None,
    length: Annotated[
        list[str] | None, typer.Option(metavar="INTS", help="Tokens of an input; a sweep likewise.")
    ] = None,
    new_tokens: Annotated[
        list[str] | None, typer.Option(metavar="INTS", help="pid: tokens generated, or learned, per prompt; likewise.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and activations.")] = Dtype.float32,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    repeats: Annotated[
        int | None, typer.Option(help="Timed runs of each candidate; 5, with --quick 2.", min=1, max=LARGEST)
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="A training step in place of inference.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes where no option names one, two runs: does it work at all.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the JSON, plots and traces; else results/DEVICE.", file_okay=False)
    ] = None,
):
    """A model end to end, stock and with a method's kernels: throughput, time to first token, peak memory, time by
    operator.

    Stock and ours run turn by turn in one process, and what they say is compared: a disagreement in float32 fails.
    Chrome traces are written too.
    """
    from ..perf.profile.sweep import parsed

    _check(device)
    sizes = parsed({"batch": batch, "streams": streams, "length": length, "new_tokens": new_tokens})
    with _refusing():
        folder_or_hub_id(model, "MODEL")
        if out is not None:
            writable_folder(out)

    import torch

    from ..perf.profile.run import run
    from ..perf.results import default_folder

    with _refusing():
        out = out or writable_folder(default_folder(device.value))

    how = {
        "dtype": getattr(torch, dtype.value),
        "device": device.value,
        "repeats": repeats,
        "train": train,
        "quick": quick,
        "out": out,
    }
    agree = run(model, None if method is None else method.value, sizes, **how, console=Console())
    raise typer.Exit(0 if agree else 1)


@app.command()
def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER", help="Where result files are. Without: benchmarks/results.", exists=True, file_okay=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Without, and without --figures and --picture: report.html.", dir_okay=False
        ),
    ] = None,
    figures: Annotated[
        list[Path] | None,
        typer.Option(
            help="A Markdown file whose figures are written anew, between its markers. May be repeated.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="An SVG file of all methods in one drawing, for the README.", dir_okay=False)
    ] = None,
):
    """Result files as one self-contained HTML page, or as the figures of the README and of docs/."""
    from ..perf import report

    page_path = (out or Path("report.html")) if out is not None or not (figures or picture) else None
    with _refusing():
        machines = report.load(folders or [Path("benchmarks/results")])
        texts = {}
        for path in figures or []:
            try:
                texts[writable_file(path, "--figures")] = report.updated(text_of(path, "--figures"), machines)
            except ValueError as error:
                raise (
                    error if str(error).startswith("--figures") else ValueError(f"--figures: {path}: {error}")
                ) from error
        if page_path is not None:
            texts[writable_file(page_path)] = report.page(machines)
        if picture is not None:
            texts[writable_file(picture, "--picture")] = report.picture(machines)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
