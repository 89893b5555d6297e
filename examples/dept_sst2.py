"""Train DePT on SST-2 with Trainer, save the adapter and load it again; compare prompt tuning and DePT as its authors
compute it.

    python examples/dept_sst2.py --model PATH_OR_ID --train train.tsv --dev dev.tsv

The model is any BERT-like encoder or any other model with a sequence classification class; its weights stay frozen.
"""

import argparse
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from rich.console import Console
from sentences import DEPT, add_arguments, base_model, dept_model, read, table, train_and_evaluate, trainer_of, write
from transformers import AutoTokenizer

from peft_kernels.dept import layer

OURS, OFFICIAL, PROMPT_TUNING = "DePT, ours", "DePT, official formulation", "prompt tuning, 100 tokens"


def official_formulation(
    input_ids, weight, prompt, a, b, *, scale, embed_scale, insert_after_first, offsets=None, adapter_ids=None
):
    """Compute the embeddings as the authors' code does: repeat, multiply, scale, add, concatenate."""
    batch, length = input_ids.shape
    update = (a @ b).repeat(batch, 1, 1)[:, :length] * scale
    tokens = embed_scale * torch.nn.functional.embedding(input_ids, weight) + update
    first = int(insert_after_first)
    return torch.cat((tokens[:, :first], prompt.repeat(batch, 1, 1), tokens[:, first:]), dim=1)


def model_of(options):
    return dept_model(options.model, options.max_length, **{name: getattr(options, name) for name in DEPT})


def prompt_tuning_model(options):
    """PEFT's own prompt tuning, with the same initialisation and learning rates."""
    config = PromptTuningConfig(
        task_type="SEQ_CLS",
        num_virtual_tokens=100,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=options.init_text,
        tokenizer_name_or_path=options.model,
    )
    model = get_peft_model(base_model(options.model), config)
    prompts = [p for name, p in model.named_parameters() if p.requires_grad and "prompt_encoder" in name]
    rest = [p for name, p in model.named_parameters() if p.requires_grad and "prompt_encoder" not in name]
    return model, [{"params": prompts, "lr": options.lr_prompt}, {"params": rest, "lr": options.lr_head}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("results/dept_sst2"))
    parser.add_argument("--virtual-tokens", type=int, default=DEPT["virtual_tokens"])
    parser.add_argument("--rank", type=int, default=DEPT["rank"])
    parser.add_argument("--init-text", default=DEPT["init_text"])
    parser.add_argument("--lr-prompt", type=float, default=DEPT["lr_prompt"])
    parser.add_argument("--lr-low-rank", type=float, default=DEPT["lr_low_rank"], help="of A and B")
    parser.add_argument("--lr-head", type=float, default=DEPT["lr_head"], help="of the classification head")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument(
        "--baseline-epochs",
        type=float,
        default=1,
        help="of the two baselines, which are there for time and memory; 0: none",
    )
    options = parser.parse_args()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = read(options.train, tokenizer, options.max_length, options.limit)
    dev = read(options.dev, tokenizer, options.max_length)

    model, groups = model_of(options)
    results = {OURS: train_and_evaluate(model, groups, options, tokenizer, train, dev, options.epochs)}
    model.save_pretrained(options.out)
    loaded = PeftModel.from_pretrained(base_model(options.model), options.out)
    again = trainer_of(loaded, None, options, tokenizer, dev, dev, 1).evaluate()["eval_accuracy"]
    if again != results[OURS]["accuracy"]:
        raise SystemExit(
            f"the adapter in {options.out} reaches {again:.4f} after loading, {results[OURS]['accuracy']:.4f} before"
        )
    console.print(f"saved to {options.out} and loaded again: accuracy {again:.1%} both times")
    if options.baseline_epochs:
        arguments = options, tokenizer, train, dev, options.baseline_epochs
        # its batches have a fixed length
        with patch.object(layer, "decomposed_prompt_embedding", official_formulation):
            results[OFFICIAL] = train_and_evaluate(*model_of(options), *arguments, options.max_length)
        results[PROMPT_TUNING] = train_and_evaluate(*prompt_tuning_model(options), *arguments)
    console.print(table(results))
    if options.baseline_epochs:
        console.print(f"the accuracy of the last two is after {options.baseline_epochs:g} of {options.epochs:g} epochs")
    write(options, results)


if __name__ == "__main__":
    main()
