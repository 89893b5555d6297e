"""Generation end to end on T5-base's architecture: many prompts of one input, beam search, and the overhead if nothing
is shared.

    python benchmarks/pid_generate.py --device cpu --dtype float32 bfloat16 --out results/pid_generate.json

Weights are random and every run decodes all its steps. Tokens are compared before anything is timed. In float32 a
difference stops the run; in 16 bits it is counted, since the summation order may decide a near-tie.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from peft_kernels import pid
from peft_kernels.perf import pid_baselines
from peft_kernels.perf.measure import Peaks, Timing, interleaved, peaks
from peft_kernels.perf.results import OURS, Row, compared, measured
from peft_kernels.perf.tables import table
from peft_kernels.perf.workloads import VOCAB_SIZE, built_in

NEW_TOKENS, BEAM_TOKENS, OVERHEAD_TOKENS = 10, 24, 32
OVERHEAD_RUNS = 12
BEAM_SHAPES = ((2, 512, 8), (2, 1024, 16))  # b, n, beams
TINY = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "d_kv": 16,
}
PIE, REPEATED, STOCK = "prompts in the encoder", "repeated encoder outputs", "stock"  # each with stock generate
UNPACKED = "ours, not packed"


class Bench:
    """The models, all sharing one set of weights, and the measurements on them."""

    def __init__(self, dtype: torch.dtype, device: str, repeats: int, quick: bool):
        self.dtype, self.device, self.repeats, self.quick = dtype, device, repeats, quick
        self.limits = peaks(dtype, device, quick=quick)
        self.stock = pid_baselines.t5_base(dtype, device, **(TINY if quick else {}))
        self.packed = pid.enable(pid_baselines.twin(self.stock))
        self.plain = pid.enable(pid_baselines.twin(self.stock), pack_weights=False)

    def prompts(self) -> list[Row]:
        """One input of 512 tokens, 30 prompts of 8, 10 new tokens, greedy."""
        workload = built_in(16, 3) if self.quick else built_in()

        def asking(method, model):
            return lambda: pid_baselines.ask(method, model, workload, NEW_TOKENS, full_length=True)

        candidates = {
            PIE: asking(pid_baselines.prompt_in_encoder, self.stock),
            REPEATED: asking(pid_baselines.repeated, self.stock),
            OURS: asking(pid_baselines.shared, self.packed),
            UNPACKED: asking(pid_baselines.shared, self.plain),
        }
        n, streams, prefix = len(workload.inputs[0]), len(workload.prompts), len(workload.prompts[0])
        roofline = generation_roofline(self.stock, self.limits, 1, n, streams, prefix, NEW_TOKENS)
        shape = {"b": 1, "n": n, "M": streams, "T": prefix, "new": NEW_TOKENS}
        return self.compare(
            "prompts", shape, candidates, REPEATED, streams * NEW_TOKENS, roofline, {PIE: max(1, self.repeats // 4)}
        )

    def beams(self, inputs: int, n: int, beams: int) -> list[Row]:
        """Ordinary beam search through ``model.generate``."""
        ids = random_ids(inputs, n, self.device)

        def searching(model):
            def search():
                with torch.inference_mode():
                    output = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        num_beams=beams,
                        max_new_tokens=BEAM_TOKENS,
                        min_new_tokens=BEAM_TOKENS,
                        do_sample=False,
                        return_dict_in_generate=True,
                    )
                return pid_baselines.Answers(output.sequences.cpu(), pid_baselines.cross_bytes(output))

            return search

        candidates = {STOCK: searching(self.stock), OURS: searching(self.packed), UNPACKED: searching(self.plain)}
        roofline = generation_roofline(self.stock, self.limits, inputs, n, inputs * beams, 0, BEAM_TOKENS)
        shape = {"b": inputs, "n": n, "M": beams, "new": BEAM_TOKENS}
        return self.compare("beams", shape, candidates, STOCK, inputs * BEAM_TOKENS, roofline, {})

    def compare(
        self,
        variant: str,
        shape: dict,
        candidates: dict,
        truth: str,
        tokens: int,
        roofline: float,
        repeats: dict[str, int],
    ) -> list[Row]:
        answers = {name: candidate() for name, candidate in candidates.items()}  # also the warm-up
        wrong = {name: pid_baselines.differing(answers[truth], answers[name]) for name in (OURS, UNPACKED)}
        if self.dtype == torch.float32 and any(wrong.values()):
            raise SystemExit(f"{variant}, {shape}: tokens differ from {truth} in {wrong} streams")
        timings = interleaved(
            candidates, {**dict.fromkeys(candidates, self.repeats), **repeats}, warmup=0, device=self.device
        )
        by_candidate = {name: {"kept_bytes": answer.cross_bytes} for name, answer in answers.items()}
        for name, streams in wrong.items():
            by_candidate[name]["error"] = streams / len(answers[truth].tokens)
        return compared(
            timings,
            by_candidate,
            shape=shape,
            variant=variant,
            phase="generate",
            roofline_s=roofline,
            items=tokens,
            item="tokens",
            **self.common,
        )

    @property
    def common(self) -> dict:
        return {"benchmark": "pid_generate", "dtype": str(self.dtype).removeprefix("torch.")}

    def overhead(self) -> list[Row]:
        """A decoding step without sharing, stock and enabled without packed weights: the Python overhead of
        enabling.
        """
        ids = random_ids(2, 16 if self.quick else 512, self.device)
        steps = {STOCK: [], OURS: []}
        tokens = {}
        with torch.inference_mode():
            states = self.stock.get_encoder()(input_ids=ids).last_hidden_state

            def decoding(name, model):
                def decode():
                    clock = StepClock()
                    tokens[name] = model.generate(
                        encoder_outputs=BaseModelOutput(last_hidden_state=states),
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=OVERHEAD_TOKENS,
                        min_new_tokens=OVERHEAD_TOKENS,
                        do_sample=False,
                        streamer=clock,
                    )
                    steps[name].append(clock.steps())

                return decode

            # enough runs to resolve one per cent
            runs = self.repeats if self.quick else max(self.repeats, OVERHEAD_RUNS)
            interleaved(
                {STOCK: decoding(STOCK, self.stock), OURS: decoding(OURS, self.plain)}, runs, device=self.device
            )
        if not torch.equal(tokens[STOCK], tokens[OURS]):
            raise SystemExit("tokens of a model that shares nothing differ once it is enabled")
        # without the warm-up
        timings = {name: Timing(tuple(s for run in runs[1:] for s in run)) for name, runs in steps.items()}
        return compared(
            timings,
            shape={"b": 2, "n": ids.shape[1], "M": 1},
            variant="nothing shared",
            phase="a decoding step",
            **self.common,
        )


class StepClock:
    """A streamer that records when tokens arrive."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def steps(self) -> list[float]:
        """Seconds from token to token; the first record is the prompt's, the second comes after the first pass."""
        return [b - a for a, b in zip(self.times[1:], self.times[2:])]


def random_ids(inputs: int, n: int, device: str) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (inputs, n), generator=torch.Generator().manual_seed(0)).to(device)


def generation_roofline(
    model: nn.Module, limits: Peaks, inputs: int, n: int, streams: int, prefix: int, new_tokens: int
) -> float:
    """The roofline bound: encoder once, keys and values once, one pass over the prompts, the remaining steps; each
    bound by bytes or operations.

    ``streams`` counts those of all inputs. Weights, keys and values are read once per pass; self-attention's own keys
    are left out.
    """
    config, itemsize = model.config, model.dtype.itemsize
    inner = config.num_heads * config.d_kv
    weights = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    cross = sum(w for name, w in weights.items() if name.endswith(("EncDecAttention.k", "EncDecAttention.v")))
    encoder = sum(w for name, w in weights.items() if name.startswith("encoder."))
    decoder = sum(w for name, w in weights.items() if name.startswith("decoder.")) - cross
    head = weights["lm_head"]
    keys = 2 * inputs * n * inner * config.num_decoder_layers

    def decode(tokens):
        operations = (
            2 * streams * (decoder * tokens + head) + 4 * streams * tokens * n * inner * config.num_decoder_layers
        )
        return limits.roofline((decoder + head + keys) * itemsize, operations)

    encode = limits.roofline(
        encoder * itemsize, 2 * encoder * inputs * n + 4 * inputs * n * n * inner * config.num_layers
    )
    project = limits.roofline((cross + keys) * itemsize, 2 * cross * inputs * n)
    return encode + project + decode(prefix + 1) + (new_tokens - 1) * decode(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument(
        "--repeats", type=int, default=20, help="timed runs of each candidate; a quarter of them for PiE"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two runs: does it work at all")
    options = parser.parse_args()
    console, machine, results = Console(), {}, []
    for name in options.dtype:
        bench = Bench(getattr(torch, name), options.device, 2 if options.quick else options.repeats, options.quick)
        machine[name] = bench.limits
        console.print(f"{name}: {bench.limits}; random weights")
        beams = [partial(bench.beams, *shape) for shape in (((2, 16, 2),) if options.quick else BEAM_SHAPES)]
        for measure in (bench.prompts, *beams, bench.overhead):
            rows = measure()
            results += rows
            console.print(table(rows))
    if options.out:
        measured(results, options.device, machine).write(options.out)


if __name__ == "__main__":
    main()
