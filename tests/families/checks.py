"""Properties of both PEFT methods for every class: an adapter that changes nothing leaves the stock model, and any
other follows the formula.
"""

import copy
import inspect
import re
from collections.abc import Callable
from contextlib import contextmanager

import torch
import transformers
from accuracy import WithinRounding
from peft import get_peft_model
from tiny import BOS, EOS, MASK, PAD
from torch import nn

from peft_kernels import DePTConfig, PASTAConfig

M, R, S = 3, 2, 16  # DePT: prompt rows, rank, max_length
RUNS = 2  # runs per bound: there are hundreds of models
FILLER = 40  # an ordinary token
HEADS = ("ForSequenceClassification", "ForQuestionAnswering")  # these decode their own input
_ENDINGS = ("logits", "last_hidden_state", "start_logits", "prediction_logits", "pooler_output", "text_embeds")


SCALED = {
    r"afmoe|blenderbot-small|ctrl|fsmt|kosmos-2.5|marian|mvp": lambda config, width: width**0.5,
    r"pegasus$|recurrent_gemma|t5gemma$|tipsv2": lambda config, width: width**0.5,
    r"granite|hyperclovax|falcon_h1": lambda config, width: 3.0,
    r"hrm_text": lambda config, width: 50.0,
}


class Refused(Exception):
    """The adapter was refused in a sentence, by get_peft_model or by the call."""


class Unusable(Exception):
    """The stock model itself does not accept text alone."""


def inputs(model, rows: int = 3, length: int = 9, padding: str = "right") -> dict:
    """Rows with special tokens at both ends and a mask token; all but the first are padded."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, 90, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    special = getattr(model.config, "mask_token_id", None)
    for i in range(rows):
        pads = 2 * (i % 3)
        ids[i, 0], ids[i, length - pads - 1] = BOS, EOS
        ids[i, 2] = MASK if special is None else special
        ids[i, length - pads :] = PAD
        mask[i, length - pads :] = 0
        if padding == "left":
            ids[i], mask[i] = ids[i].roll(pads), mask[i].roll(pads)
    x = {"input_ids": ids}
    names = inspect.signature(model.forward).parameters
    if "attention_mask" in names:
        x["attention_mask"] = mask
    if type(model).__name__ == "LongformerForQuestionAnswering":  # expects three separators
        x["global_attention_mask"] = (ids == BOS).long()
    if (
        getattr(model.config, "is_encoder_decoder", False)
        and "decoder_input_ids" in names
        and not type(model).__name__.endswith(HEADS)
    ):
        x["decoder_input_ids"] = torch.randint(10, 90, (rows, 5), generator=generator)
    return x


def labels(model, x: dict) -> dict:
    kind = type(model).__name__
    names = inspect.signature(model.forward).parameters
    if model.config.model_type == "git":  # its labels of text must match the logits behind those of its image
        return {}
    if (
        "labels" not in names
        or getattr(model.config, "is_encoder_decoder", False)
        or not kind.endswith(("CausalLM", "MaskedLM", "LMHeadModel"))
    ):
        return {}
    return {"labels": x["input_ids"].masked_fill(x.get("attention_mask", torch.ones(())) == 0, -100)}


def outputs(output) -> dict[str, torch.Tensor]:
    """The tensors that a user reads."""
    if not hasattr(output, "items"):
        output = {"first": output[0] if isinstance(output, tuple) else output}
    found = {
        k: v
        for k, v in output.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and (k in _ENDINGS or k in ("loss", "first"))
    }
    return found or {k: v for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


def assert_equal(got: dict, function: Callable, shown: torch.Tensor | None, what: str):
    """Assert that ``got`` equals the result of ``function()``, up to rounding, at the tokens that are ``shown``."""

    def read(output):
        return {name: x if shown is None or x.shape[:2] != shown.shape else x[shown] for name, x in output.items()}

    try:
        WithinRounding(lambda: read(function()), runs=RUNS).check(read(got))
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def run(model, x: dict) -> dict:
    torch.manual_seed(5)
    return outputs(model(**x))


def adapt(base, config):
    try:
        return get_peft_model(copy.deepcopy(base), config).eval()
    except (ValueError, TypeError) as error:
        if not str(error).startswith(("DePT", "PASTA")):
            raise
        raise Refused(str(error)) from error


def stock_of(base, x):
    try:
        expected = run(base, x)
        again = run(base, x)
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error
    if any(not torch.equal(expected[k].nan_to_num(), again[k].nan_to_num()) for k in expected):
        raise Unusable("the stock model gives other numbers at its second call")
    if not any(torch.isfinite(v).all() and v.numel() > 1 and v.std() > 0 for v in expected.values()):
        raise Unusable("the stock model's outputs are constant or not finite")
    return expected


@torch.no_grad()
def dept_that_changes_nothing(base):
    x = inputs(base)
    shown = x["attention_mask"].bool() if "attention_mask" in x else None
    x |= labels(base, x)
    stock_of(base, x)
    model = adapt(base, DePTConfig(num_virtual_tokens=0, r=R, max_length=S))
    assert_equal(run(model, x), lambda: run(base, x), shown, "B = 0")
    if base.can_generate() and type(base).generate is transformers.GenerationMixin.generate:
        generate(base, model)


def generate(base, model):
    x = inputs(base, padding="right" if base.config.is_encoder_decoder else "left")
    x.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    try:
        torch.manual_seed(5)
        expected = base.generate(**x, **settings)
    except Exception:
        return  # needs more than text
    torch.manual_seed(5)
    try:
        got = model.generate(**x, **settings)
    except ValueError as error:
        if not str(error).startswith("DePT"):
            raise
        raise Refused(f"generate: {error}") from error
    if not torch.equal(got, expected) and not base.config.is_encoder_decoder:
        # transformers' generate counts RoBERTa's positions from 0, its forward from padding_idx + 1: DePT generates as
        # it trains
        expected = greedy(base, x, settings["max_new_tokens"])
    assert torch.equal(got, expected), f"generate: {got[:, -3:].tolist()} instead of {expected[:, -3:].tolist()}"


def greedy(model, x, tokens):
    for _ in range(tokens):
        new = model(**x).logits[:, -1:].argmax(-1)
        x = {name: torch.cat([value, new if name == "input_ids" else value[:, -1:]], 1) for name, value in x.items()}
    return x["input_ids"]


@torch.no_grad()
def dept_by_formula(base):
    """Compare with the oracle: the stock model with ordinary tokens in the prompt's place; an embedding hook inserts
    prompt and update.
    """
    x = inputs(base)
    x |= labels(base, x)
    stock_of(base, x)
    model = adapt(base, DePTConfig(num_virtual_tokens=M, r=R, max_length=S))
    prompt, update = filled(model)
    first = int(model.peft_config["default"].insert_after_first)
    scale, decoded = scale_after(base), decoded_by(base, x)

    def formula():
        with prompted(base, prompt, update, first, scale, decoded):
            return run(base, x)

    assert_equal(run(model, x), formula, x["attention_mask"].bool() if "attention_mask" in x else None, "formula")


@torch.no_grad()
def filled(model):
    """Fill with random parameters; returns the prompt (m, d) and the update (s, d)."""
    layer, generator = model.base_model.model.dept, torch.Generator().manual_seed(7)
    prompt, a, b = (q["default"] for q in (layer.dept_prompt, layer.dept_a, layer.dept_b))
    for q in (prompt, a, b):
        q.copy_(torch.randn(q.shape, generator=generator) * 0.3)
    return prompt, model.peft_config["default"].scale * (a @ b)


@contextmanager
def prompted(base, prompt, update, first: int, scale: float, decoded=None):
    """``base`` with ``prompt`` after ``first`` tokens and ``update`` added; ``scale``: the factor that it applies after
    its embedding module.

    ``decoded``: the decoder input, without a prompt, of a head that decodes its own input.
    """
    module = base if base.can_generate() else base.base_model  # a head without generation sees no prompt
    pairs = base.config.is_encoder_decoder
    reader = module.get_encoder() if pairs else module
    weight, seen = embedding_of(reader, module).weight, {}

    def widen(t, fill):
        return torch.cat([t[:, :first], t.new_full((len(t), M), fill), t[:, first:]], 1)

    def before(_, args, kwargs):
        kwargs = dict(zip(inspect.signature(module.forward).parameters, args)) | kwargs
        if decoded is not None and kwargs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = decoded
        seen["ids"] = kwargs["input_ids"] = widen(kwargs["input_ids"], FILLER)
        for name, fill in {
            "attention_mask": 1,
            "token_type_ids": 0,
            "global_attention_mask": 0,
            "labels": -100,
        }.items():
            if kwargs.get(name) is not None and kwargs[name].shape[1] == seen["ids"].shape[1] - M:
                kwargs[name] = widen(kwargs[name], fill)
        return (), kwargs

    def looked_up(_, args, kwargs, output):
        ids = args[0] if args else kwargs["input"]
        if "ids" not in seen or "done" in seen or ids.ndim != 2:
            return None
        if torch.equal(ids.T, seen["ids"]):  # XLNet: (tokens, batch)
            return looked_up(None, (ids.T,), {}, output.transpose(0, 1)).transpose(0, 1)
        length = seen["ids"].shape[1]
        if not torch.equal(ids[:, :length], seen["ids"]):
            return None
        seen["done"] = True
        tokens = torch.cat([output[:, :first], output[:, first + M : length]], 1) + update[: length - M] / scale
        return torch.cat(
            [tokens[:, :first], (prompt / scale).expand(len(ids), -1, -1), tokens[:, first:], output[:, length:]], 1
        )

    def narrow(value):
        if isinstance(value, tuple):
            return tuple(narrow(v) for v in value)
        if not isinstance(value, torch.Tensor) or value.ndim != 3 or value.shape[1] != seen["ids"].shape[1]:
            return value
        return torch.cat([value[:, :first], value[:, first + M :]], 1)

    def after(_, args, output):
        return type(output)(**{k: narrow(v) for k, v in output.items()}) if hasattr(output, "items") else narrow(output)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    if not pairs:
        handles.append(module.register_forward_hook(after))
    tables = [m for m in base.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
    handles += [m.register_forward_hook(looked_up, with_kwargs=True) for m in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert "done" in seen, "the oracle saw no look-up of its tokens"


def decoded_by(base, x):
    if not type(base).__name__.endswith(HEADS) or not base.config.is_encoder_decoder:
        return None
    seen = []
    handle = base.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    run(base, x)
    handle.remove()
    return seen[0]


def embedding_of(*parts):
    for part in parts:
        try:
            return part.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
    raise AssertionError("no input embedding")


def scale_after(base) -> float:
    """The factor that the model applies to its embedding module's output; written down, not measured."""
    kind, text = base.config.model_type, base.config.get_text_config()
    width = base.base_model.config.get_text_config().hidden_size
    if type(base).__name__ == "BlenderbotSmallForCausalLM":  # has a scale that it does not use
        return 1.0
    return next((float(scale(text, width)) for pattern, scale in SCALED.items() if re.match(pattern, kind)), 1.0)


@torch.no_grad()
def pasta(base):
    x = inputs(base)
    shown = x["attention_mask"].bool() if "attention_mask" in x else None
    stock_of(base, x)
    model = adapt(base, PASTAConfig(num_special_tokens=2, special_token_ids=[BOS, EOS], init="zero", dropout=0.0))
    assert_equal(run(model, x), lambda: run(base, x), shown, "v = 0")
    layer = model.base_model.model.pasta
    v = layer.pasta_vectors["default"]  # [L, P, d]
    v.copy_(torch.randn(v.shape, generator=torch.Generator().manual_seed(7)) * 0.5)
    one_hot = torch.stack([x["input_ids"] == BOS, x["input_ids"] == EOS], -1).float()  # [B, S, P]

    from peft_kernels.pasta import family

    passes = family.passes_of(base.base_model)

    def formula():
        remaining = iter(range(len(passes)))

        def hook(module, args, kwargs):
            i = next(remaining)
            assert passes[i] is module
            hidden = args[0] if args else kwargs["hidden_states"]
            addition = nn.functional.pad(one_hot @ v[i], (0, 0, 0, hidden.shape[1] - one_hot.shape[1]))
            if args:
                return (hidden + addition, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden + addition}

        handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in dict.fromkeys(passes)]
        try:
            output = run(base, x)
        finally:
            for handle in handles:
                handle.remove()
        assert next(remaining, None) is None
        return output

    assert_equal(run(model, x), formula, shown, "formula")


@torch.no_grad()
def is_causal(base) -> bool:
    """Whether changing the last token leaves the first token's output unchanged."""
    x = {name: value[:1] for name, value in inputs(base).items()}  # not padded
    y = x | {"input_ids": torch.cat([x["input_ids"][:, :-1], x["input_ids"][:, -1:] + 1], 1)}
    first = lambda given: {name: value[:, 0] for name, value in run(base.base_model, given).items() if value.ndim == 3}  # noqa: E731
    try:
        WithinRounding(lambda: first(x), runs=RUNS).check(first(y))
    except AssertionError:
        return False
    return True
