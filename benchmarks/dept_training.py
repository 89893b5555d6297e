"""A training step of T5-base's architecture: DePT, DePT as its authors compute it, and PEFT's prompt tuning; time and peak memory.

    python benchmarks/dept_training.py --device cpu --dtype float32 --out benchmarks/results/cpu/dept_training.json

All three train 76,800 parameters: 100 prompt rows, or 60 and a low-rank update of rank 30 over 256 positions, which is the paper's
trade (arXiv 2309.05173, table 1). Random weights, random tokens, labels of 4 tokens; the base is frozen. A step is forward, backward and AdamW.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PromptTuningConfig, get_peft_model
from rich import box
from rich.console import Console
from rich.table import Table

from peft_kernels import DePTConfig, dept
from peft_kernels.bench.cases.decomposed_prompt_embedding import official_formulation
from peft_kernels.bench.measure import interleaved, peak_memory, write_json
from peft_kernels.bench.methods import t5_base, twin
from peft_kernels.dept import layer

OURS, OFFICIAL, PROMPT_TUNING = "DePT, ours", "DePT, official formulation", "prompt tuning, 100 tokens"
LABELS = 4


def step_of(base, config, formulation, ids, labels):
    model = get_peft_model(twin(base), config).train()
    groups = dept.param_groups(model) if isinstance(config, DePTConfig) else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def step():
        with patch.object(layer, "decomposed_prompt_embedding", formulation):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, sum(p.numel() for p in model.parameters() if p.requires_grad)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two runs: does it work at all")
    options = parser.parse_args()
    virtual, rank, length, more_virtual = (6, 3, 24, 10) if options.quick else (60, 30, 256, 100)
    tiny = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 100}
    console, results = Console(), []
    for name in options.dtype:
        base = t5_base(getattr(torch, name), options.device, **(tiny if options.quick else {})).requires_grad_(False)
        vocabulary = base.config.vocab_size
        ids, labels = (torch.randint(3, vocabulary, (options.batch_size, n), device=options.device) for n in (length, LABELS))
        ours = DePTConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=virtual, r=rank, max_length=length)
        configs = {
            OURS: (ours, layer.decomposed_prompt_embedding),
            OFFICIAL: (ours, official_formulation),
            PROMPT_TUNING: (PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=more_virtual, num_transformer_submodules=1), None),
        }
        made = {way: step_of(base, *config, ids, labels) for way, config in configs.items()}
        steps = {way: step for way, (step, _) in made.items()}
        for step in steps.values():
            step()
        peaks = {way: peak_memory(step, options.device)[1] for way, step in steps.items()}
        timings = interleaved(steps, 2 if options.quick else options.repeats, warmup=0, device=options.device)
        ways = {way: {**t.to_json(), "peak_bytes": peaks[way], "trained_parameters": made[way][1]} for way, t in timings.items()}
        results.append({"dtype": name, "batch_size": options.batch_size, "ways": ways})
        console.print(table(name, ways))
    if options.out:
        write_json(options.out, device=options.device, results=results)


def table(dtype: str, ways: dict[str, dict]) -> Table:
    result = Table("way", title=f"{dtype}, a training step", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ms", "spread", "x prompt tuning", "peak MB", "parameters"):
        result.add_column(column, justify="right")
    for name, way in ways.items():
        ratio = way["median_s"] / ways[PROMPT_TUNING]["median_s"]
        peak = "-" if way["peak_bytes"] is None else f"{way['peak_bytes'] / 1e6:,.0f}"
        result.add_row(name, f"{way['median_s'] * 1e3:,.1f}", f"{way['spread']:.0%}", f"{ratio:.2f}", peak, f"{way['trained_parameters']:,}")
    return result


if __name__ == "__main__":
    main()
