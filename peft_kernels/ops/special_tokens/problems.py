"""Benchmarks of PASTA's operators: every row has k special tokens, [CLS] first and the others at random positions.

"official": the authors' order of operations. Python loops over the rows find the special tokens; then each of them
takes a multiplication and an addition over all hidden states.
"""

import torch

from ... import ops
from ..problem import Candidate, Operator, Problem, RandomInputs, compiled, fresh, plain

SPECIAL = 100, 101, 102, 103  # ids below ORDINARY
ORDINARY = 1000
VOCABULARY = 30_522


def finding(shape, variant, dtype, device, backward) -> Problem:
    batch, length, count = (shape[letter] for letter in "BSk")
    random = RandomInputs(device, dtype)
    ids = random.integers(ORDINARY, VOCABULARY, batch, length)
    slots = special_positions(random, batch, length, count)
    ids.scatter_(1, slots, random.integers(SPECIAL[0], SPECIAL[-1] + 1, batch, count))
    special_ids = torch.tensor(SPECIAL, device=device)

    def ours(impl):
        return Candidate(lambda: ops.special_token_slots(ids, special_ids, max_slots=count, impl=impl))

    def cost(backward):
        from . import cost

        return cost.special_token_slots(ids, special_ids, max_slots=count, backward=backward)

    def official():
        rows = [[position for position, token in enumerate(row) if token in SPECIAL] for row in ids.tolist()]
        return torch.tensor([(row + [-1] * count)[:count] for row in rows], dtype=torch.int32, device=device)

    def scattered():
        special = torch.isin(ids, special_ids)
        # the extra column past the end takes all other tokens
        column = (special.cumsum(1) - 1).masked_fill(~special, count)
        positions = torch.arange(length, dtype=torch.int32, device=device).expand(batch, -1)
        slots = torch.full((batch, count + 1), -1, dtype=torch.int32, device=device)
        return slots.scatter_(1, column, positions)[:, :count]

    return Problem(
        leaves=(),
        grads=(),
        ours=ours,
        truth=lambda: slots,
        cost=cost,
        baselines={
            "official": lambda: Candidate(official, synchronizes=True),
            "isin, cumsum, scatter": plain(scattered),
            "isin, cumsum, scatter, compiled": compiled(scattered),
        },
    )


def adding(shape, variant, dtype, device, backward) -> Problem:
    hidden, vectors, grad, slots = addition(shape, dtype, device)

    def ours(impl):
        return Candidate(lambda hidden, vectors: ops.special_token_add(hidden, vectors, slots, impl=impl))

    def cost(hidden, vectors, backward):
        from . import cost

        return cost.special_token_add(hidden, vectors, slots, backward=backward)

    dense, rows = dense_add(slots, hidden), rows_of(slots, hidden)

    def indexed(hidden, vectors):
        return hidden.flatten(0, 1).index_add(0, rows, repeated(vectors, slots)).view(hidden.shape)

    return Problem(
        leaves=(hidden, vectors),
        grads=(grad,),
        ours=ours,
        truth=dense_add(slots, hidden.double()),
        cost=cost,
        baselines={
            "official": plain(official_add(slots, hidden)),
            "dense add": plain(dense),
            "dense add, compiled": compiled(dense),
            "index_add": plain(indexed),
        },
        roofline=fresh(device, hidden),
    )


def adding_in_place(shape, variant, dtype, device, backward) -> Problem:
    """The problem in place: each candidate repeatedly adds to its own tensor, detached from the last iteration."""
    hidden, vectors, grad, slots = addition(shape, dtype, device)

    def on_its_own_tensor(add):
        def prepare():
            target = hidden.clone()
            return Candidate(lambda vectors: add(target.detach(), vectors))

        return prepare

    def ours(impl):
        return on_its_own_tensor(lambda target, vectors: ops.special_token_add_(target, vectors, slots, impl=impl))()

    def cost(vectors, backward):
        from . import cost

        return cost.special_token_add_(hidden, vectors, slots, backward=backward)

    rows, dense, official = rows_of(slots, hidden), dense_add(slots, hidden), official_add(slots, hidden)

    def indexed(target, vectors):
        target.flatten(0, 1).index_add_(0, rows, repeated(vectors, slots))
        return target

    return Problem(
        leaves=(vectors,),
        grads=(grad,),
        ours=ours,
        truth=lambda vectors: dense_add(slots, hidden.double())(hidden.double(), vectors),
        cost=cost,
        baselines={
            "official": plain(lambda vectors: official(hidden, vectors)),
            "dense add": plain(lambda vectors: dense(hidden, vectors)),
            "dense add, compiled": compiled(lambda vectors: dense(hidden, vectors)),
            "index_add_": on_its_own_tensor(indexed),
        },
    )


def addition(shape, dtype, device):
    """Draws hidden (B, S, d), vectors (k, d), gradient (B, S, d), slots (B, k)."""
    batch, length, width, count = (shape[letter] for letter in "BSdk")
    random = RandomInputs(device, dtype)
    hidden, grad = (random.normal(batch, length, width) for _ in range(2))
    return hidden, random.normal(count, width), grad, special_positions(random, batch, length, count)


def special_positions(random, batch, length, count):
    """Draws positions, (B, k), ascending; the first is 0."""
    drawn = torch.rand(batch, length - 1, generator=random.generator).argsort(1)[:, : count - 1] + 1
    return torch.cat((torch.zeros(batch, 1, dtype=torch.int64), drawn.sort(1).values), 1).to(random.device)


def one_hot_of(slots, like):
    """Returns the slots as one-hot columns, (B, S, k)."""
    return torch.nn.functional.one_hot(slots, like.shape[1]).mT.to(like.dtype)


def official_add(slots, like):
    masks = one_hot_of(slots, like).unsqueeze(-1).unbind(2)  # k of (B, S, 1)

    def add(hidden, vectors):
        for mask, vector in zip(masks, vectors):
            hidden = hidden + mask * vector.expand_as(hidden)
        return hidden

    return add


def dense_add(slots, like):
    one_hot = one_hot_of(slots, like)
    return lambda hidden, vectors: hidden + one_hot @ vectors


def rows_of(slots, like):
    """Returns the slots, (B * k,), as row indices into ``like`` with its first two dimensions flattened."""
    return (slots + torch.arange(len(slots), device=slots.device)[:, None] * like.shape[1]).flatten()


def repeated(vectors, slots):
    return vectors.expand(len(slots), -1, -1).flatten(0, 1)


WIDE = tuple(dict(zip("BSdk", size)) for size in ((32, 128, 768, 2), (32, 128, 1024, 2)))
QUICK = ({"B": 16, "S": 128, "d": 512, "k": 2},)
ADD = {"shapes": WIDE, "quick_shapes": QUICK}

OPERATORS = {
    "special_token_slots": Operator(
        name="special_token_slots",
        title="Slots of special tokens",
        about="PASTA: where the special tokens of B rows of S tokens are, at most k in a row.",
        published="official",
        shapes=({"B": 32, "S": 128, "k": 2}, {"B": 32, "S": 512, "k": 3}),
        quick_shapes=({"B": 16, "S": 128, "k": 2},),
        dtypes=("int64",),
        has_backward=False,
        problem=finding,
    ),
    "special_token_add": Operator(
        name="special_token_add",
        title="Addition to special tokens",
        about="PASTA: vectors of width d added to k special tokens in each of B rows of S tokens.",
        published="official",
        problem=adding,
        **ADD,
    ),
    "special_token_add_": Operator(
        name="special_token_add_",
        title="Addition to special tokens, in place",
        about="PASTA: the same without a copy; other tokens are not touched.",
        published="official",
        problem=adding_in_place,
        **ADD,
    ),
}
