"""Inputs of ``decomposed_prompt_embedding``, and its formula."""

import against_reference
import torch

from peft_kernels.ops import decomposed_prompt_embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (batch, tokens, virtual tokens, rank, width, positions, adapters), offsets, adapter_ids
CASES = {
    "plain": ((3, 17, 5, 4, 32, 20, 0), None, None),
    "one-of-all": ((1, 1, 1, 1, 1, 1, 0), None, None),
    "odd-width": ((2, 13, 3, 3, 101, 13, 0), None, None),
    "wide": ((2, 30, 4, 30, 2056, 40, 0), None, None),
    "no-prompt": ((3, 9, 0, 4, 24, 9, 0), None, None),
    "no-token": ((3, 0, 5, 4, 24, 9, 0), None, None),
    "no-rank": ((2, 5, 3, 0, 16, 9, 0), None, None),
    "high-rank": ((2, 5, 1, 600, 24, 5, 0), None, None),
    "no-row": ((0, 7, 3, 2, 16, 9, 0), None, None),
    "offsets": ((4, 19, 3, 5, 48, 19, 0), [0, 3, 19, 18], None),
    "one-stacked": ((3, 11, 2, 4, 40, 15, 1), None, None),
    "adapters": ((7, 23, 6, 5, 72, 31, 4), None, [2, -1, 0, 2, 2, 3, 0]),
    "adapters-offsets": ((6, 29, 4, 3, 40, 29, 3), [0, 29, 5, 11, 28, 1], [1, 0, -1, 1, 2, 2]),
    "none": ((3, 8, 4, 3, 16, 8, 2), [1, 0, 8], [-1, -1, -1]),
}


def make(case, dtype=torch.float32, device="cpu", seed=0, vocabulary=50, parameters=None):
    """ids and table; prompt, a, b; the keyword arguments."""
    (batch, length, virtual, rank, width, positions, adapters), offsets, adapter_ids = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    stack = (adapters,) if adapters else ()
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)
    trained = [
        normal(*stack, *shape, dtype=parameters or dtype)
        for shape in ((virtual, width), (positions, rank), (rank, width))
    ]
    where = {"offsets": offsets, "adapter_ids": adapter_ids}
    where = {name: None if x is None else torch.tensor(x, dtype=torch.long, device=device) for name, x in where.items()}
    return (ids, normal(vocabulary, width)), trained, where


def by_hand(
    ids, weight, prompt, a, b, *, scale=1.0, embed_scale=1.0, offsets=None, insert_after_first=False, adapter_ids=None
):
    """The formula, one row and one token at a time; autograd computes the gradients."""
    prompt, a, b = (x if x.ndim == 3 else x[None] for x in (prompt, a, b))
    delta = scale * a @ b
    rows = []
    for i, row in enumerate(ids.tolist()):
        adapter = 0 if adapter_ids is None else int(adapter_ids[i])
        tokens = [embed_scale * weight[token] for token in row]
        if adapter >= 0:
            offset = 0 if offsets is None else int(offsets[i])
            tokens = [x + delta[adapter, j - offset] if j >= offset else x for j, x in enumerate(tokens)]
        virtual = list(prompt[adapter] if adapter >= 0 else torch.zeros_like(prompt[0]))
        first = int(insert_after_first and bool(tokens))
        rows.append(torch.stack([*tokens[:first], *virtual, *tokens[first:]]) if tokens or virtual else weight[:0])
    return torch.stack(rows) if rows else weight.new_empty(0, prompt.shape[1] + ids.shape[1], weight.shape[1])


def compare(embed, table, trained, **options):
    """Assert equality within rounding of plain PyTorch in the same dtype."""
    ids, weight = table

    def of_ids(function):
        return lambda *leaves, **options: function(ids, *leaves, **options)

    out, *_ = against_reference.compare(of_ids(embed), of_ids(by_hand), (weight, *trained), **options)
    assert out.is_contiguous()


def of(impl):
    return lambda *args, **kwargs: decomposed_prompt_embedding(*args, **kwargs, impl=impl)
