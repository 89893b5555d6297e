"""What ``peft-kernels tune`` runs: for every row of every shipped table a call that spends much of its time in that row's kernel."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from ...ops.add_layer_norm_inject import triton as norm
from ...ops.decomposed_prompt_embedding import triton as embedding
from ...ops.label_cross_attention import triton as label_attention
from ...ops.label_logits import triton as logits
from ...ops.prototype_scores import triton as prototypes
from ...ops.shared_cross_attention import triton as attention
from ...ops.special_tokens import triton as special_tokens
from ...ops.tuned import Site


class Target(NamedTuple):
    """``make()`` returns a call on fresh inputs, the same every time. The call returns tensors, or None among them."""

    site: Site
    shipped: dict[str, Any]
    dtype: torch.dtype
    make: Callable[[], Callable[[], tuple]]


class Sizes(NamedTuple):
    """The defaults: of a step that fills a large GPU."""

    batch: int = 32
    tokens: int = 512
    width: int = 1024
    vocabulary: int = 8192
    prompt: int = 60  # virtual tokens
    rank: int = 45
    specials: int = 4  # special tokens to a row, and vectors
    texts: int = 4096
    classes: int = 16
    documents: int = 8  # of attention: each is shared by many streams
    head_dims: tuple[int, ...] = (64, 128, 256)
    norm_widths: tuple[int, ...] = (512, 1024, 2048, 4096)
    prototype_widths: tuple[int, ...] = (64, 128, 256)


LARGE = Sizes()


class Setting(NamedTuple):
    dtype: torch.dtype
    device: torch.device
    sizes: Sizes


class RandomInputs:
    """Tensors that are the same whenever they are drawn in the same order."""

    def __init__(self, setting: Setting):
        self.dtype, self.device, _ = setting
        self.generator = torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def targets(operator: str, dtype: torch.dtype, device: torch.device, sizes: Sizes = LARGE) -> Iterator[Target]:
    """Of one operator. What depends on no dtype belongs to float32."""
    setting = Setting(dtype, device, sizes)
    for kernel, key, shipped, make in TARGETS[operator](setting):
        yield Target(Site(operator, kernel, key), shipped, dtype, partial(make, setting))


def _attention_targets(setting):
    dtype, device, sizes = setting
    family, _ = attention.device_of(device)
    size = dtype.itemsize
    for head_dim in sizes.head_dims:
        configs = attention.configs_of(family, size, head_dim)
        key = size, attention.table_d(head_dim)

        def shipped(config, head_dim=head_dim):
            return attention.launch_options(config, family, size, head_dim)

        for config in configs.forward:
            rows = config.rows * (4 if config is configs.forward[-1] else 1)  # the last is taken for all that are more
            yield "forward", (*key, config.rows), shipped(config), partial(_attention_forward, head_dim=head_dim, rows=rows)
        grad = partial(_attention_backward, head_dim=head_dim)
        yield "query_grad", key, shipped(configs.query_grad), partial(grad, needs=(True, False, False))
        yield "key_value_grad", key, shipped(configs.key_value_grad), partial(grad, needs=(False, True, True))


def _attention_inputs(setting, head_dim, rows):
    """One token to a stream. In memory (streams, tokens, heads, D), as projections leave it."""
    random, sizes = RandomInputs(setting), setting.sizes
    heads = max(1, sizes.width // head_dim)
    query, grad = (random.normal(sizes.documents * rows, 1, heads, head_dim).transpose(1, 2) for _ in range(2))
    key, value = (random.normal(sizes.documents, sizes.tokens, heads, head_dim).transpose(1, 2) for _ in range(2))
    return (query, key, value), grad


def _attention_forward(setting, head_dim, rows):
    inputs, _ = _attention_inputs(setting, head_dim, rows)
    return lambda: attention.forward(*inputs, None, None, head_dim**-0.5)


def _attention_backward(setting, head_dim, needs):
    inputs, grad = _attention_inputs(setting, head_dim, setting.sizes.tokens)
    saved = attention.forward(*inputs, None, None, head_dim**-0.5)
    return lambda: attention.backward(grad, None, *inputs, *saved, None, None, head_dim**-0.5, *needs)


def _embedding_targets(setting):
    size = setting.dtype.itemsize
    configs = embedding.CONFIGS[embedding.device_of(setting.device)[0], size]
    yield "product", (size,), embedding.forward_options(configs.forward, False, with_product=True), partial(_embedding_forward, with_product=True)
    yield "delta", (size,), embedding.forward_options(configs.forward, False, with_product=False), partial(_embedding_forward, with_product=False)
    yield "backward", (size,), embedding.backward_options(configs.backward, False), _embedding_backward


def _embedding_forward(setting, with_product):
    random, sizes = RandomInputs(setting), setting.sizes
    tables = random.integers(sizes.vocabulary, sizes.batch, sizes.tokens), random.normal(sizes.vocabulary, sizes.width)
    shapes = (sizes.prompt, sizes.width), (sizes.tokens, sizes.rank), (sizes.rank, sizes.width)
    prompt, a, b = (random.normal(1, *shape, dtype=torch.float32) for shape in shapes)
    update = (a, b, None) if with_product else (None, None, a @ b)
    return lambda: (embedding.forward(*tables, prompt, *update, 1.0, 1.0, None, False, None),)


def _embedding_backward(setting):
    sizes = setting.sizes
    grad = RandomInputs(setting).normal(sizes.batch, sizes.prompt + sizes.tokens, sizes.width)
    return lambda: embedding.backward(grad, 1, sizes.prompt, sizes.tokens, None, False, None, True, True)


def _special_token_targets(setting):
    size = setting.dtype.itemsize
    if setting.dtype == torch.float32:
        yield "slots", (), special_tokens.slots_options(), _find_slots
    yield "add", (size,), special_tokens.add_options(size), _add
    yield "backward", (size,), special_tokens.backward_options(size, False), _vector_grad


def _slots(setting):
    """(B, k): as far apart as they can be."""
    sizes = setting.sizes
    apart = torch.arange(sizes.specials, dtype=torch.int32, device=setting.device) * (sizes.tokens // sizes.specials)
    return apart.repeat(sizes.batch, 1)


def _vectors(random, setting, width):
    return random.normal(1, setting.sizes.specials, width, dtype=torch.float32)


def _find_slots(setting):
    sizes = setting.sizes
    ids, specials = RandomInputs(setting).integers(sizes.vocabulary, sizes.batch, sizes.tokens), torch.arange(sizes.specials, device=setting.device)
    return lambda: special_tokens.slots(ids, specials, None, sizes.tokens)


def _add(setting):
    random, sizes = RandomInputs(setting), setting.sizes
    hidden, vectors, slots = random.normal(sizes.batch, sizes.tokens, sizes.width), _vectors(random, setting, sizes.width), _slots(setting)

    def call():
        special_tokens.add_(hidden, vectors, slots, 0.0, None, None)
        return (hidden,)

    return call


def _vector_grad(setting):
    sizes = setting.sizes
    grad, slots = RandomInputs(setting).normal(sizes.batch, sizes.tokens, sizes.width), _slots(setting)
    return lambda: (special_tokens.backward(grad, slots, 1, sizes.specials, 0.0, None, None),)


def _norm_targets(setting):
    for width in setting.sizes.norm_widths:
        shipped = norm.row_options(width)
        for kernel, make in (("forward", _norm_forward), ("backward", _norm_backward)):
            yield kernel, (setting.dtype.itemsize, shipped["BD"]), shipped, partial(make, width=width)


def _norm_inputs(setting, width):
    """As many elements whatever the width."""
    random, sizes = RandomInputs(setting), setting.sizes
    x, residual = (random.normal(sizes.batch, max(sizes.specials, sizes.tokens * sizes.width // width), width) for _ in range(2))
    weight, bias = (random.normal(width, dtype=torch.float32) for _ in range(2))
    return x, residual, weight, bias, _vectors(random, setting, width), _slots(setting)


def _norm_forward(setting, width):
    inputs = _norm_inputs(setting, width)
    return lambda: norm.forward(*inputs, None, 1e-5, False, False, 0.0, None, True)


def _norm_backward(setting, width):
    inputs = _norm_inputs(setting, width)
    grad, _, weight, _, _, slots = inputs
    _, *saved = norm.forward(*inputs, None, 1e-5, False, False, 0.0, None, True)
    arguments = grad, None, *saved, weight, slots, None, 1, setting.sizes.specials, False, False, 0.0, None
    return lambda: norm.backward(*arguments, True, False)


def _logit_targets(setting):
    size = setting.dtype.itemsize
    for config in logits.FORWARD:
        yield "forward", (size, config.words), logits.launch_options(config), partial(_logits_forward, words=config.words)
    yield "backward", (size,), logits.launch_options(logits.BACKWARD), _logits_backward


def _logits_forward(setting, words):
    random, sizes = RandomInputs(setting), setting.sizes
    hidden, weight = random.normal(sizes.texts, sizes.width), random.normal(sizes.vocabulary, sizes.width)
    label_ids = random.integers(sizes.vocabulary, 1, words)
    return lambda: (logits.forward(hidden, weight, label_ids, None, None),)


def _logits_backward(setting):
    random, sizes = RandomInputs(setting), setting.sizes
    words = logits.FORWARD[-1].words
    grad, weight = random.normal(sizes.texts, 1, words, dtype=torch.float32), random.normal(sizes.vocabulary, sizes.width)
    label_ids = random.integers(sizes.vocabulary, 1, words)
    return lambda: (logits.backward(grad, weight, label_ids),)


def _prototype_targets(setting):
    makers = {"forward": _scores, "backward": _scores_backward, "prototypes": _scores_backward, "cross_entropy": _cross_entropy}
    for width in setting.sizes.prototype_widths if setting.dtype == torch.float32 else ():
        shipped = prototypes.row_options(width)
        for kernel, make in makers.items():
            yield kernel, (shipped["BD"],), shipped, partial(make, width=width)


def _score_inputs(setting, width):
    random, (texts, classes) = RandomInputs(setting), (setting.sizes.texts, setting.sizes.classes)
    rows = random.normal(texts, width), random.normal(classes, width) / math.sqrt(width)
    return *rows, random.normal(classes), random.normal(texts, classes), random.integers(classes, texts)


def _scores(setting, width):
    *inputs, _ = _score_inputs(setting, width)
    return lambda: (prototypes.forward(*inputs, 1.0),)


def _scores_backward(setting, width):
    projected, of_classes, _, grad, _ = _score_inputs(setting, width)
    return lambda: prototypes.backward(grad, projected, of_classes)


def _cross_entropy(setting, width):
    *inputs, labels = _score_inputs(setting, width)
    return lambda: prototypes.cross_entropy(*inputs, 1.0, labels)


def _label_attention_targets(setting):
    unit, size = label_attention.unit_of(setting.device, setting.dtype), setting.dtype.itemsize
    blocks = [block for of_unit, block in label_attention.CONFIGS if of_unit == unit]
    for block in blocks:
        pool = partial(_pool, queries=block)
        yield "scores", (size, block), label_attention.scores_options(unit, block), pool
        yield "pool", (size, block), label_attention.pool_options(unit, block), pool
    if setting.dtype == torch.float32:
        yield "softmax", (), label_attention.SOFTMAX, partial(_pool, queries=blocks[-1])
        yield "softmax_backward", (), label_attention.SOFTMAX, partial(_pool_backward, queries=blocks[-1])


def _pool_inputs(setting, queries):
    """Of one head: queries (1, 1, S, d), features (B, n, d), the gradient of what is pooled (1, B, S, d)."""
    random, sizes = RandomInputs(setting), setting.sizes
    features = random.normal(sizes.batch, sizes.tokens, sizes.width)
    return random.normal(1, 1, queries, sizes.width), features, random.normal(1, sizes.batch, queries, sizes.width)


def _pool(setting, queries):
    of_slots, features, _ = _pool_inputs(setting, queries)
    return lambda: label_attention.pool(of_slots, features, None, None, setting.sizes.width**-0.5, True)


def _pool_backward(setting, queries):
    of_slots, features, grad = _pool_inputs(setting, queries)
    _, weights = label_attention.pool(of_slots, features, None, None, setting.sizes.width**-0.5, True)
    return lambda: (label_attention.pool_backward(grad, features, weights, None, None, setting.sizes.width**-0.5, True),)


TARGETS = {
    "shared_cross_attention": _attention_targets,
    "decomposed_prompt_embedding": _embedding_targets,
    "special_tokens": _special_token_targets,
    "add_layer_norm_inject": _norm_targets,
    "label_logits": _logit_targets,
    "prototype_scores": _prototype_targets,
    "label_cross_attention": _label_attention_targets,
}
