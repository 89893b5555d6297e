"""Tiny random models of every family, and the outputs of stock transformers for them: the truth for the enabled
model.
"""

import copy
import inspect
from contextlib import contextmanager
from functools import cache

import torch
import transformers
from accuracy import assert_no_near_tie
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel, LogitsProcessor

transformers.logging.set_verbosity_error()

# 5.17's UMT5 attends to the future of a prompt with sdpa if no mask prevents it: eager is right
UMT5_SDPA_IS_CAUSAL = "is_causal=config.is_decoder" in inspect.getsource(
    inspect.getmodule(transformers.UMT5ForConditionalGeneration)
)

VOCAB, PAD, EOS = 99, 0, 1
_COMMON = {"vocab_size": VOCAB, "d_model": 32, "pad_token_id": PAD, "eos_token_id": EOS}
_T5 = dict(
    _COMMON,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=3,
    decoder_start_token_id=0,
    initializer_factor=1.5,
    dropout_rate=0.0,
)
_BART = dict(
    _COMMON,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
    decoder_start_token_id=2,
    bos_token_id=3,
    forced_eos_token_id=None,
    init_std=0.4,
    dropout=0.0,
    attention_dropout=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
)
_WHISPER = dict(
    _BART,
    num_mel_bins=8,
    max_source_positions=20,
    max_target_positions=48,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)
del _WHISPER["max_position_embeddings"]
CONFIGS = {
    "t5": ("T5", _T5),
    "mt5": ("MT5", _T5),
    "umt5": ("UMT5", _T5),
    "longt5-local": ("LongT5", dict(_T5, local_radius=4, encoder_attention_type="local")),
    "longt5-global": (
        "LongT5",
        dict(_T5, local_radius=4, global_block_size=4, encoder_attention_type="transient-global"),
    ),
    "bart": ("Bart", _BART),
    "mbart": ("MBart", _BART),
    "pegasus": ("Pegasus", _BART),
    "marian": ("Marian", dict(_BART, decoder_vocab_size=VOCAB)),
    "m2m_100": ("M2M100", _BART),
    "blenderbot": ("Blenderbot", _BART),
    "blenderbot-small": ("BlenderbotSmall", _BART),
    "plbart": ("PLBart", _BART),
    "bigbird_pegasus": ("BigBirdPegasus", dict(_BART, attention_type="original_full")),
    "whisper": ("Whisper", _WHISPER),
}
# wide: with enc_to_dec_proj
TEXT_FAMILIES = [
    *(name for name in CONFIGS if name != "whisper"),
    "encoder-decoder",
    "encoder-decoder-wide",
]
RELATIVE = [name for name in TEXT_FAMILIES if "t5" in name]


def build(family: str, attention: str | None = None, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    """A model in eval mode whose weights depend on the arguments alone; they are large, so that its tokens depend on
    everything that it reads.

    ``attention`` None: transformers' default, sdpa if the family has it (LongT5 and BigBirdPegasus: eager).
    """
    torch.manual_seed(seed)
    if family == "umt5" and attention is None and not UMT5_SDPA_IS_CAUSAL:
        attention = "eager"
    if family.startswith("encoder-decoder"):
        return _bert2bert(48 if family.endswith("wide") else 32, attention, changes)
    name, settings = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes}, attn_implementation=attention)
    suffix = "MTModel" if name == "Marian" else "ForConditionalGeneration"
    return _loud(getattr(transformers, name + suffix)(config))


def _bert2bert(width, attention, changes):
    bert = {
        "vocab_size": VOCAB,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.35,
    }
    bert |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=attention, **changes)
    encoder = BertModel(BertConfig(hidden_size=width, **bert), add_pooling_layer=False)
    decoder = BertLMHeadModel(BertConfig(hidden_size=32, is_decoder=True, add_cross_attention=True, **bert))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for c in (model.config, model.generation_config):
        c.decoder_start_token_id, c.pad_token_id, c.eos_token_id = 2, PAD, EOS
    return _loud(model)


def _loud(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5) if p.ndim > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@cache
def shared(family: str, attention: str | None = None) -> transformers.PreTrainedModel:
    """One model per process, for tests that do not change it."""
    return build(family, attention)


def inputs(b: int = 3, n: int = 9, mask: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids with a mask that is full, padded right or left, or has holes; the first row is always full."""
    ids = torch.randint(4, VOCAB, (b, n), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones_like(ids)
    for i in range(1, b):
        if mask == "right":
            keep[i, n - 2 * i :] = 0
        elif mask == "left":
            keep[i, : 2 * i] = 0
        elif mask == "holes":
            keep[i, i :: i + 2] = 0
    return {"input_ids": ids, "attention_mask": keep}


_rounding_of_logits: dict[str, float] = {}


def rounding_of_logits(model) -> float:
    """The root mean square error of logits against float64, relative to the logits; measured once per configuration."""
    key = f"{type(model)} {model.config.to_dict()}"
    if key not in _rounding_of_logits:
        name, generator = model.main_input_name, torch.Generator().manual_seed(1)
        x = inputs() if name == "input_ids" else {name: torch.randn(3, 8, 40, generator=generator) * 3}
        ids = torch.randint(4, VOCAB, (3, 12), generator=generator)

        with torch.no_grad():
            logits = model(**x, decoder_input_ids=ids).logits
            x = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
            truth = copy.deepcopy(model).double()(**x, decoder_input_ids=ids).logits
        _rounding_of_logits[key] = float((logits - truth).norm() / truth.norm())
    return _rounding_of_logits[key]


@contextmanager
def moved_logits(model, times: float = 16.0):
    """Context in which every logit is perturbed at random by ``times`` its rounding error."""
    share, generator = times * rounding_of_logits(model), torch.Generator().manual_seed(0)

    def move(module, args, logits):
        draw = torch.randn(logits.shape, generator=generator).to(logits.dtype)
        return logits + draw * share * logits.square().mean(-1, keepdim=True).sqrt()

    handle = model.get_output_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def decided(model, generate, of=lambda output: output):
    """The result of ``generate()``, after checking that rounding decides none of its tokens, which ``of`` takes from
    the result.

    All rounding on the way to a token shows at the logits. Perturbing those, by 16 times their error against float64,
    takes one more run; ``Rounding`` in every operation takes as long as eight.
    """
    before = torch.get_rng_state()
    output = generate()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert_no_near_tie(lambda: of(generate()), of(output), rounding=moved_logits(model))
    torch.set_rng_state(after)
    return output


def start_of(model) -> int:
    return model.generation_config.decoder_start_token_id


def tail(row: list[int]) -> list[int]:
    """Generated ids up to the end token; if there is none, without trailing padding."""
    if EOS in row:
        return row[: row.index(EOS) + 1]
    while row and row[-1] == PAD:
        row = row[:-1]
    return row


def stock_streams(model, x: dict, per_input: list[list[list[int]]], **kwargs) -> list[list[list[int]]]:
    """Every stream decoded alone by a model that is not enabled."""

    def one(i, prompt):
        ids = torch.tensor([[start_of(model), *prompt]])
        row = {k: v[i : i + 1] for k, v in x.items()} | {
            "decoder_input_ids": ids,
            "decoder_attention_mask": torch.ones_like(ids),
        }
        rows = decided(model, lambda: model.generate(**row, **kwargs))
        tails = [tail(row) for row in rows[:, ids.shape[1] :].tolist()]
        return tails if len(tails) > 1 else tails[0]

    return [[one(i, prompt) for prompt in prompts] for i, prompts in enumerate(per_input)]


class EarlyEnds(LogitsProcessor):
    """Row r ends at step ``steps[r]``; no other row ends before the limit."""

    def __init__(self, steps):
        self.steps, self.seen = torch.tensor(steps), 0

    def __call__(self, input_ids, scores):
        ends = self.steps == self.seen
        self.seen += 1
        scores = scores.clone()
        scores[:, EOS] = torch.where(ends, 1e4, -1e4).to(scores.dtype)
        return scores
