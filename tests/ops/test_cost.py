"""Bytes and operations of every operator against numbers computed by hand."""

import torch

from peft_kernels.ops.add_layer_norm_inject import cost as norms
from peft_kernels.ops.cost import Cost
from peft_kernels.ops.decomposed_prompt_embedding import cost as embeddings
from peft_kernels.ops.label_cross_attention import cost as label_attention
from peft_kernels.ops.label_logits import cost as logits
from peft_kernels.ops.prototype_scores import cost as prototypes
from peft_kernels.ops.shared_cross_attention import cost as attention
from peft_kernels.ops.special_tokens import cost as special_tokens


def empty(*size, grad=False, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, requires_grad=grad)


def integers(*values):
    return torch.tensor(values)


def test_shared_cross_attention_reads_each_input_once_and_no_padding():
    # 2 inputs of 5 keys, 3 streams each, 1 token, 1 head of 4: a matmul is 6 rows x 5 keys x 4, 240 operations
    query, key, value = (empty(n, 1, t, 4, grad=True) for n, t in ((6, 1), (2, 5), (2, 5)))
    assert attention.shared_cross_attention(query, key, value) == Cost(2 * 96 + 2 * 160, 2 * 240)
    # 7 of the 10 keys; streams of the first input see 5, of the second 2: 3 * (5 + 2) pairs
    ragged = attention.shared_cross_attention(query, key, value, key_lengths=integers(5, 2))
    assert ragged == Cost(2 * 96 + 2 * 7 * 16 + 16, 2 * 2 * 21 * 4)
    mostly_short = attention.shared_cross_attention(
        query, key, value, key_lengths=integers(5, 2), encoder_index=integers(0, 1, 1, 1, 1, 1)
    )
    assert mostly_short.operations == 2 * 2 * (5 + 5 * 2) * 4


def test_shared_cross_attention_does_no_gradient_work_for_what_is_frozen():
    query, key, value = empty(6, 1, 1, 4, grad=True), empty(2, 1, 5, 4), empty(2, 1, 5, 4)
    # forward, then the output's gradient read and the query's written: matmuls for dP and dQ
    assert attention.shared_cross_attention(query, key, value, backward=True) == Cost(4 * 96 + 2 * 160, 4 * 240)
    key.requires_grad_(), value.requires_grad_()
    assert attention.shared_cross_attention(query, key, value, backward=True) == Cost(4 * 96 + 4 * 160, 6 * 240)


def test_decomposed_prompt_embedding():
    # 2 rows of 3 tokens, prompt of 2, rank 1, width 4: 24 elements, a matmul of 2 * 3 * 4 operations
    ids, table = torch.zeros(2, 3, dtype=torch.int64), empty(9, 4, dtype=torch.bfloat16)
    parameters = empty(2, 4, grad=True), empty(3, 1, grad=True), empty(1, 4, grad=True)
    read, out = 48 + 24 * 2 + (8 + 3 + 4) * 4, 2 * 5 * 4 * 2
    assert embeddings.decomposed_prompt_embedding(ids, table, *parameters) == Cost(read + out, 24 + 24)
    expected = Cost(read + 2 * out + (8 + 3 + 4) * 4, 3 * 24 + 2 * 24)
    assert embeddings.decomposed_prompt_embedding(ids, table, *parameters, backward=True) == expected
    delta = embeddings.decomposed_prompt_embedding(ids, table, parameters[0], delta=empty(3, 4))
    assert delta == Cost(48 + 48 + 32 + 48 + out, 24)


def test_special_tokens():
    ids, slots = torch.zeros(2, 7, dtype=torch.int64), integers([0, 6], [0, -1])
    assert special_tokens.special_token_slots(ids, [1, 2, 3], max_slots=2) == Cost(2 * 7 * 8 + 3 * 8 + 2 * 2 * 4, 0)
    hidden, vectors = empty(2, 7, 5), empty(2, 5, grad=True)
    in_place = special_tokens.special_token_add_(hidden, vectors, slots)
    assert in_place == Cost(2 * 3 * 5 * 4 + 40 + 32, 3 * 5)  # 3 rows hold a special token
    assert special_tokens.special_token_add_(hidden, vectors, slots, backward=True) == Cost(
        in_place.bytes + 60 + 40, 2 * 15
    )
    assert special_tokens.special_token_add_(hidden, vectors.detach(), slots, backward=True) == in_place
    assert special_tokens.special_token_add(hidden, vectors, slots) == Cost(2 * 280 + 40 + 32, 15)


def test_add_layer_norm_inject():
    x, residual, weight = empty(2, 3, 5, grad=True), empty(2, 3, 5, grad=True), empty(5)
    assert norms.add_layer_norm_inject(x, residual, weight).bytes == 3 * 120 + 20
    # one gradient for both
    assert norms.add_layer_norm_inject(x, residual, weight, backward=True).bytes == 5 * 120 + 20
    assert norms.add_inject_layer_norm(x, residual, weight).bytes == 4 * 120 + 20
    assert norms.add_inject_layer_norm(x, residual, weight, backward=True).bytes == 7 * 120 + 20
    vectors, slots = empty(2, 5, grad=True), torch.zeros(2, 2, dtype=torch.int32)
    assert (
        norms.add_layer_norm_inject(x, residual, weight, None, vectors, slots, backward=True).bytes
        == 5 * 120 + 20 + 2 * 40 + 16
    )


def test_label_logits():
    # one of 4 positions in 2 texts, 3 words of 2 classes, width 5: the vocabulary of 100 is not read
    hidden, weight, ids = empty(2, 4, 5, grad=True), empty(100, 5), integers([1, 2], [3, -1])
    forward = logits.label_logits(hidden, weight, ids, bias=empty(100), positions=integers(0, 1))
    assert forward == Cost(2 * 20 + 3 * 20 + 3 * 4 + 32 + 16 + 2 * 2 * 4, 2 * 2 * 3 * 5)
    backward = logits.label_logits(hidden, weight, ids, bias=empty(100), positions=integers(0, 1), backward=True)
    assert backward == Cost(forward.bytes + 16 + 160, 2 * forward.operations)


def test_prototype_scores():
    features, projection, centres, radius = empty(3, 8), empty(4, 8, grad=True), empty(2, 4), empty(2, grad=True)
    read = 96 + 128 + 32 + 8 + 24
    forward = prototypes.prototype_scores(features, projection, centres, radius, empty(3, 2))
    assert forward == Cost(read + 24, 2 * 3 * 8 * 4 + 3 * 24)
    backward = prototypes.prototype_scores(features, projection, centres, radius, empty(3, 2), backward=True)
    assert backward == Cost(read + 2 * 24 + 128 + 8, 2 * 2 * 3 * 8 * 4 + 6 * 24)
    loss = prototypes.prototype_cross_entropy(features, projection, centres, radius, empty(3, 2), integers(0, 1, 1))
    assert loss == Cost(read + 24 + 4, forward.operations)
    objective = prototypes.prototype_objective(empty(3, 4), radius, centres, empty(3, 2), integers(0, 1, 1))
    assert objective == Cost(48 + 8 + 32 + 24 + 24 + 4 + 48 + 8, 6 * 24)


def test_label_cross_attention_takes_the_cheaper_form():
    # 2 rows of 6 tokens, 2 heads, width 8: one slot is cheaper absorbed, many are cheaper with keys and values
    features, weights = empty(2, 6, 8), [empty(8, 8, grad=True) for _ in range(3)]
    few, many = empty(1, 8, grad=True), empty(9, 8, grad=True)
    forward = label_attention.label_cross_attention(few, features, *weights, num_heads=2)
    assert forward == Cost(384 + 32 + 3 * 256 + 64, 2 * 128 + 2 * 128 + 2 * (2 * 12 * 2 * 8))
    assert label_attention.label_cross_attention(
        many, features, *weights, num_heads=2
    ).operations == 9 * 128 + 2 * 12 * 128 + 2 * (2 * 12 * 9 * 8)
    backward = label_attention.label_cross_attention(few, features, *weights, num_heads=2, backward=True)
    assert backward.bytes == forward.bytes + 64 + 32 + 3 * 256
    frozen = label_attention.label_cross_attention(
        few.detach(), features, *(w.detach() for w in weights), num_heads=2, backward=True
    )
    assert frozen.operations == forward.operations
    padded = label_attention.label_cross_attention(few, features, *weights, lengths=integers(6, 1), num_heads=2)
    assert padded.bytes == forward.bytes - 5 * 32 + 16
