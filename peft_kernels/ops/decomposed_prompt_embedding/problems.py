"""Benchmarks of DePT's embedding against every published formulation.

Parameters are float32, tokens random; "16 adapters": the rows of the batch take the adapters in turn.
"""

import torch
from torch.nn.functional import embedding

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, compiled, fresh, plain

VOCABULARY = 32_128
SCALE = 1.5


def problem(shape, variant, dtype, device, backward) -> Problem:
    batch, length, virtual, rank, width = (shape[letter] for letter in "BLmrd")
    adapters = 16 if variant == "16 adapters" else 1
    random = RandomInputs(device, dtype)
    ids = random.integers(0, VOCABULARY, batch, length)
    table = random.normal(VOCABULARY, width)
    sizes = (virtual, width), (length, rank), (rank, width)
    adapter_ids = torch.arange(batch, device=device) % adapters if adapters > 1 else None
    grad = random.normal(batch, virtual + length, width)

    def ours(impl):
        return Candidate(
            lambda *leaves: ops.decomposed_prompt_embedding(
                ids, table, *leaves, scale=SCALE, adapter_ids=adapter_ids, impl=impl
            )
        )

    def cost(prompt, a, b, backward):
        from . import cost

        return cost.decomposed_prompt_embedding(ids, table, prompt, a, b, adapter_ids=adapter_ids, backward=backward)

    def truth(*leaves):
        rows = torch.arange(ids.numel(), device=device).view(ids.shape)
        return expanded(rows, embedding(ids, table).double().flatten(0, 1), adapter_ids)(*leaves)

    views = expanded(ids, table, adapter_ids)
    return Problem(
        leaves=tuple(random.normal(adapters, *size, dtype=torch.float32) for size in sizes),
        grads=(grad,),
        ours=ours,
        truth=truth,
        cost=cost,
        baselines={
            "official": plain(official(ids, table, adapter_ids)),
            "expanded": plain(views),
            "expanded, compiled": compiled(views),
        },
        roofline=fresh(device, grad),
    )


def official(ids, table, adapter_ids):
    """The authors' formulation; with several adapters, the same on parameters gathered for every row."""
    if adapter_ids is None:
        return lambda prompt, a, b: official_formulation(ids, table, prompt[0], a[0], b[0], scale=SCALE)

    def embed(prompt, a, b):
        update = (a[adapter_ids] @ b[adapter_ids]) * SCALE
        return torch.cat((prompt[adapter_ids].to(table.dtype), embedding(ids, table) + update.to(table.dtype)), dim=1)

    return embed


def official_formulation(
    ids, weight, prompt, a, b, *, scale, embed_scale=1.0, insert_after_first=False, offsets=None, adapter_ids=None
):
    """The authors' order of operations: multiply, repeat prompt and update for every row, scale, add, concatenate."""
    batch, length = ids.shape
    prompts = prompt.repeat(batch, 1, 1).to(weight.dtype)
    update = (a @ b).repeat(batch, 1, 1)[:, :length] * scale
    tokens = embed_scale * embedding(ids, weight) + update.to(weight.dtype)
    first = int(insert_after_first)
    return torch.cat((tokens[:, :first], prompts, tokens[:, first:]), dim=1)


def expanded(ids, table, adapter_ids):
    """The official formulation with views in place of copies."""

    def embed(prompt, a, b):
        if adapter_ids is None:
            prompts, update = prompt.expand(ids.shape[0], -1, -1), SCALE * (a @ b)
        else:
            prompts, update = prompt[adapter_ids], (SCALE * (a @ b))[adapter_ids]
        return torch.cat((prompts.to(table.dtype), embedding(ids, table) + update.to(table.dtype)), dim=1)

    return embed


def shapes(*sizes):
    return tuple(dict(zip("BLmrd", size)) for size in sizes)


OPERATORS = {
    "decomposed_prompt_embedding": Operator(
        name="decomposed_prompt_embedding",
        title="Decomposed prompt embedding",
        about="DePT: a soft prompt of m rows, then L embedded tokens with an update of rank r, for B rows of width d.",
        published="official",
        shapes=shapes((16, 256, 60, 30, 768), (32, 256, 40, 45, 1024), (8, 1024, 60, 30, 4096)),
        quick_shapes=shapes((16, 128, 20, 30, 512)),
        variants=("", "16 adapters"),
        problem=problem,
    )
}
