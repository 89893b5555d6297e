"""Inputs of ``label_logits``, and its formula."""

import against_reference
import torch

from peft_kernels.ops import label_logits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["max", "mean", "logsumexp"]
# (batch, tokens or 0 for (B, H), width, vocabulary), label_ids
CASES = {
    "two words": ((3, 7, 32, 50), [[4], [9]]),
    "one of all": ((1, 1, 1, 1), [[0]]),
    "odd width": ((5, 4, 101, 33), [[4, 9], [32, 0]]),
    "wide": ((2, 3, 2056, 20), [[4], [9], [1]]),
    "classes of different size": ((32, 6, 40, 30), [[4, -1, -1], [9, 3, 1], [-1, 7, -1]]),
    "shared words": ((64, 6, 40, 30), [[4, 4, 5], [5, 3, 4]]),
    "rows alone": ((6, 0, 48, 30), [[4, 8], [9, -1]]),
    "many classes": ((70, 2, 24, 400), [[3 * i, 3 * i + 1] for i in range(120)]),
    "no text": ((0, 4, 16, 9), [[1], [2]]),
    "no text, rows alone": ((0, 0, 16, 9), [[1], [2]]),
    "no class": ((3, 4, 16, 9), []),
}


def make(case, dtype=torch.float32, device="cpu", seed=0):
    """hidden, weight, label_ids, bias, positions."""
    (batch, length, width, vocabulary), label_ids = case
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*((batch, length, width) if length else (batch, width)), generator=generator).to(device, dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(device, dtype)
    bias = torch.randn(vocabulary, generator=generator).to(device, dtype)
    positions = torch.randint(length, (batch,), generator=generator).to(device) if length else None
    return (
        hidden,
        weight,
        torch.tensor(label_ids, dtype=torch.long, device=device).reshape(len(label_ids), -1 if label_ids else 1),
        bias,
        positions,
    )


def by_hand(hidden, weight, label_ids, bias=None, positions=None, reduce="max"):
    """The logits of the whole vocabulary at every token; autograd computes the gradients."""
    logits = hidden @ weight.mT if bias is None else hidden @ weight.mT + bias
    if positions is not None:
        logits = logits[torch.arange(len(hidden), device=hidden.device), positions.long()]
    of_classes = []
    for ids in label_ids.tolist():
        words = logits[:, [i for i in ids if i >= 0]]
        of_classes.append(
            {"max": lambda x: x.amax(1), "mean": lambda x: x.mean(1), "logsumexp": lambda x: x.logsumexp(1)}[reduce](
                words
            )
        )
    return torch.stack(of_classes, 1) if of_classes else logits[:, :0]


def compare(function, hidden, weight, label_ids, bias, positions, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""

    def ordered(function):
        return lambda hidden, weight, bias, *rest, **options: function(hidden, weight, *rest, bias=bias, **options)

    leaves, out_dtype = (hidden, weight, bias), torch.promote_types(hidden.dtype, torch.float32)
    options |= {"positions": positions, "out_dtype": out_dtype}
    against_reference.compare(ordered(function), ordered(by_hand), leaves, label_ids, **options)


def of(impl):
    return lambda *args, **kwargs: label_logits(*args, **kwargs, impl=impl)
