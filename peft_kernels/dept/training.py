"""Optimizer groups with separate learning rates for prompts and low-rank updates."""

from torch import nn


def param_groups(
    model: nn.Module,
    lr_prompt: float = 0.3,
    lr_low_rank: float = 5e-4,
    weight_decay: float = 0.0,
    lr_head: float | None = None,
) -> list[dict]:
    """Optimizer groups for the trainable parameters of ``model``: prompts, A and B, and the rest (a task head).

    Use them with ``Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": param_groups(model), "lr":
    5e-4}))``, or with ``Seq2SeqTrainer(..., optimizers=(torch.optim.AdamW(param_groups(model)), None))``, which lacks
    the former argument. The paper trains T5 with AdamW, a prompt rate of 0.3 to 0.4, a low-rank rate of 1e-4 to 5e-3
    and no weight decay. Encoders such as BERT, whose embeddings are a hundred times smaller, need rates that are a
    hundred times smaller.

    Args:
        model: a model with a DePT adapter.
        lr_prompt: learning rate of the prompts.
        lr_low_rank: learning rate of A and B.
        weight_decay: weight decay of all groups.
        lr_head: learning rate of the rest; None: ``lr_low_rank``.

    Raises:
        ValueError: ``model`` has no trainable DePT adapter.
    """
    groups: dict[str, list[nn.Parameter]] = {"prompt": [], "low_rank": [], "head": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_low_rank = ".dept_a." in name or ".dept_b." in name
            groups["prompt" if ".dept_prompt." in name else "low_rank" if is_low_rank else "head"].append(p)
    if not groups["prompt"]:
        raise ValueError("param_groups: model must have a trainable DePT adapter, got none")
    rates = {"prompt": lr_prompt, "low_rank": lr_low_rank, "head": lr_low_rank if lr_head is None else lr_head}
    return [
        {"params": groups[name], "lr": rates[name], "weight_decay": weight_decay} for name in groups if groups[name]
    ]
