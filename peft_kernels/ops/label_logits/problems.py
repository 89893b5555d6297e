"""Benchmarks of label-word logits at the mask position of every text.

The output embedding is frozen, hidden states take gradients.
"""

import torch

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, compiled, plain


def problem(shape, variant, dtype, device, backward) -> Problem:
    batch, length, vocabulary, width, classes, count = (shape[letter] for letter in "BSVHCw")
    random = RandomInputs(device, dtype)
    hidden, weight = random.normal(batch, length, width), random.normal(vocabulary, width)
    bias = random.normal(vocabulary)
    positions = random.integers(0, length, batch)
    words = torch.randperm(vocabulary, generator=random.generator)[: classes * count].to(device)
    ids, texts = words.view(classes, count), torch.arange(batch, device=device)

    def ours(impl):
        return Candidate(
            lambda hidden: ops.label_logits(hidden, weight, ids, bias=bias, positions=positions, impl=impl)
        )

    def cost(hidden, backward):
        from . import cost

        return cost.label_logits(hidden, weight, ids, bias=bias, positions=positions, backward=backward)

    def largest(logits):
        return logits.view(batch, classes, count).amax(2)

    def full(hidden):
        return largest((hidden[texts, positions] @ weight.T + bias)[:, words])

    def gathered(hidden):
        return largest(hidden[texts, positions] @ weight[words].T + bias[words])

    return Problem(
        leaves=(hidden,),
        grads=(random.normal(batch, classes, dtype=torch.float32),),
        ours=ours,
        truth=lambda hidden: largest(hidden[texts, positions] @ weight[words].double().T + bias[words].double()),
        cost=cost,
        baselines={
            "full LM head": plain(full),
            "gathered columns": plain(gathered),
            "gathered columns, compiled": compiled(gathered),
        },
    )


OPERATORS = {
    "label_logits": Operator(
        name="label_logits",
        title="Logits of label words",
        about="DecT: from states of width H, the logits of w words for each of C labels in B texts of S tokens,"
        " without those of all V words.",
        published="full LM head",
        shapes=tuple(dict(zip("BSVHCw", size)) for size in ((64, 32, 50_265, 768, 2, 1), (64, 32, 50_265, 768, 14, 1))),
        quick_shapes=({"B": 16, "S": 32, "V": 8192, "H": 512, "C": 4, "w": 1},),
        problem=problem,
    )
}
