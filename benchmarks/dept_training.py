"""A training step of T5-base's architecture under DePT, DePT as its authors compute it, and PEFT's prompt tuning: time
and peak memory.

    python benchmarks/dept_training.py --device cpu --dtype float32 --out results/dept_training.json

All three train 76,800 parameters: 100 prompt rows, or 60 rows and a low-rank update of rank 30 over 256 positions,
which is the paper's trade-off (arXiv 2309.05173, table 1). Random weights, random tokens, labels of 4 tokens; the base
is frozen. A step is forward, backward, AdamW.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PromptTuningConfig, get_peft_model
from rich.console import Console

from peft_kernels import DePTConfig, dept
from peft_kernels.dept import layer
from peft_kernels.ops.decomposed_prompt_embedding.problems import official_formulation
from peft_kernels.perf.measure import interleaved, peak_memory
from peft_kernels.perf.pid_baselines import t5_base, twin
from peft_kernels.perf.results import OURS, compared, measured
from peft_kernels.perf.tables import table

OFFICIAL, PROMPT_TUNING = "official formulation", "prompt tuning, 100 tokens"
LABELS = 4


def step_of(base, config, formulation, ids, labels):
    model = get_peft_model(twin(base), config).train()
    groups = (
        dept.param_groups(model)
        if isinstance(config, DePTConfig)
        else [p for p in model.parameters() if p.requires_grad]
    )
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def step():
        with patch.object(layer, "decomposed_prompt_embedding", formulation):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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
    tiny = {
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "d_kv": 16,
        "vocab_size": 100,
    }
    console, results = Console(), []
    for name in options.dtype:
        base = t5_base(getattr(torch, name), options.device, **(tiny if options.quick else {})).requires_grad_(False)
        vocabulary = base.config.vocab_size
        ids, labels = (
            torch.randint(3, vocabulary, (options.batch_size, n), device=options.device) for n in (length, LABELS)
        )
        ours = DePTConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=virtual, r=rank, max_length=length)
        configs = {
            OURS: (ours, layer.decomposed_prompt_embedding),
            OFFICIAL: (ours, official_formulation),
            PROMPT_TUNING: (
                PromptTuningConfig(
                    task_type="SEQ_2_SEQ_LM", num_virtual_tokens=more_virtual, num_transformer_submodules=1
                ),
                None,
            ),
        }
        steps = {candidate: step_of(base, *config, ids, labels) for candidate, config in configs.items()}
        for step in steps.values():
            step()
        memory = {candidate: {"peak_bytes": peak_memory(step, options.device)[1]} for candidate, step in steps.items()}
        timings = interleaved(steps, 2 if options.quick else options.repeats, warmup=0, device=options.device)
        common = {
            "benchmark": "dept_training",
            "shape": {"B": options.batch_size, "L": length},
            "dtype": name,
            "phase": "training step",
        }
        rows = compared(timings, memory, items=options.batch_size, item="samples", **common)
        results += rows
        console.print(table(rows))
    if options.out:
        measured(results, options.device).write(options.out)


if __name__ == "__main__":
    main()
