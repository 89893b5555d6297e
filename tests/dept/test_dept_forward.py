"""Every task: outputs, losses and gradients equal those of the formula written out; shapes equal those of the model
without an adapter.
"""

import copy

import dept_models as models
import pytest
import torch
from accuracy import WithinRounding, assert_within_rounding
from dept_models import MODELS

NAMES = [name for name in MODELS if name not in ("gpt2-sequence", "roberta-qa")]


def _main(output):
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula(name):
    """In float64, so that only the formula decides; other tests run in float32 and bfloat16."""
    stock = models.stock(name).double()
    model = models.adapted(name, base=copy.deepcopy(stock))
    x = models.inputs()
    labels = models.targets(name, x)
    p = [q.detach().clone().requires_grad_() for q in models.parameters(model)]

    def results(output, main, parameters):
        # over all columns, a norm before would leave nothing to learn
        loss = output.loss if labels else main[..., :8].square().mean()
        return main.detach(), loss.detach(), torch.autograd.grad(loss, parameters)

    def expected():
        output = models.by_formula(name, stock, p, x, labels)
        main = _main(output)
        per_token = (
            main.ndim == 3
            and "labels" in labels
            and labels["labels"].shape == x["input_ids"].shape
            or "labels" not in labels
        )
        return results(output, models.narrowed(name, main) if per_token else main, p)

    got = model(**x, **labels)
    assert_within_rounding(results(got, _main(got), list(models.parameters(model))), expected)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapter_and_head_are_trained(name):
    model = models.adapted(name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".dept." in n or ".modules_to_save." in n for n in trained)
    assert {n.rsplit(".", 2)[1] for n in trained if ".dept." in n} == {"dept_prompt", "dept_a", "dept_b"}
    x = models.inputs()
    output = model(**x, **models.targets(name, x))
    output[0].float().square().sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in models.parameters(model))


def test_padded_rows_of_a_causal_classifier_are_read_at_their_last_token():
    """The expected scores are computed by hand: the stock classifier cannot find the last token in inputs_embeds."""
    stock, model = models.pair("gpt2-sequence")
    x = models.inputs()

    def expected():
        wide = models.by_formula("gpt2-sequence", stock.transformer, models.parameters(model), x)
        last = x["attention_mask"].sum(1) - 1
        return stock.score(models.narrowed("gpt2-sequence", wide.last_hidden_state)[torch.arange(3), last])

    assert_within_rounding(model(**x).logits, expected)


def test_spans_are_those_of_the_input():
    stock, model = models.pair("roberta-qa")
    x = models.inputs(padding="none")  # RoBERTa gives padding another position in inputs_embeds than in input_ids
    p = models.parameters(model)
    spans = {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 1, 3])}

    def expected():
        wide = models.by_formula("roberta-qa", stock.roberta, p, x).last_hidden_state
        start, end = stock.qa_outputs(models.narrowed("roberta-qa", wide)).unbind(-1)
        losses = [
            torch.nn.functional.cross_entropy(logits, spans[f"{k}_positions"])
            for k, logits in (("start", start), ("end", end))
        ]
        return sum(losses) / 2, start, end

    got = model(**x, **spans)
    assert_within_rounding((got.loss, got.start_logits, got.end_logits), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-token", "bert-features", "t5-encoder"])
def test_shapes_are_those_of_the_stock_model(name):
    stock, model = models.pair(name)
    x = models.inputs()
    expected, got = (m(**x, output_hidden_states=True) for m in (stock, model))
    assert _main(got).shape == _main(expected).shape
    assert [h.shape for h in got.hidden_states] == [h.shape for h in expected.hidden_states]
    as_tuple = model(**x, return_dict=False)
    assert torch.equal(as_tuple[0], _main(got))


@pytest.mark.parametrize("name", ["t5", "bart-scaled", "pegasus", "gpt2", "gemma", "bert-sequence"])
def test_inputs_embeds_in_place_of_ids(name):
    """They are the first layer's input: already scaled."""
    stock, model = models.pair(name)
    x = models.inputs()
    labels = models.targets(name, x)
    embeddings = (MODELS[name][5] * stock.get_input_embeddings().weight[x["input_ids"]]).detach().requires_grad_()
    got = model(inputs_embeds=embeddings, attention_mask=x["attention_mask"], **labels)
    assert_within_rounding(got.loss, lambda: model(**x, **labels).loss)
    got.loss.backward()
    assert embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name", ["t5", "bart", "t5-encoder", "llama", "gpt2", "bert-token", "roberta-qa", "bert-sequence"]
)
def test_left_padding_by_tokens_equals_no_padding(name):
    model = models.adapted(name, position="token")
    x = models.inputs(padding="left")
    labels = models.targets(name, x) if name in models.ENCODER_DECODER else {}
    got = model(**x, **labels)
    for i, mask in enumerate(x["attention_mask"]):
        keep = mask.bool()
        row, given = {k: v[i : i + 1, keep] for k, v in x.items()}, {k: v[i : i + 1] for k, v in labels.items()}
        key = next(key for key in ("logits", "start_logits", "last_hidden_state") if key in got)
        per_token = got[key].shape[:2] == mask.expand(3, -1).shape and not labels
        assert_within_rounding(got[key][i, keep] if per_token else got[key][i], lambda: model(**row, **given)[key][0])


def test_left_padding_by_columns_counts_the_padding():
    stock, model = models.pair("t5")
    x = models.inputs(padding="left")
    labels = models.targets("t5", x)
    expected = WithinRounding(lambda: models.by_formula("t5", stock, models.parameters(model), x, labels).logits)
    expected.check(model(**x, **labels).logits)
    model.peft_config["default"].position = "token"
    with pytest.raises(AssertionError, match="error"):
        expected.check(model(**x, **labels).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-token", "roberta-sequence"])
def test_given_position_ids_move_on_behind_the_prompt(name):
    model = models.adapted(name)
    x = models.inputs()
    first = 1 if name.startswith("roberta") else 0
    positions = torch.arange(first, 8 + first).expand(3, -1)
    assert_within_rounding(model(**x, position_ids=positions).logits, lambda: model(**x).logits)


def test_token_types_of_the_prompt_are_zero():
    stock, model = models.pair("bert-features")
    x = models.inputs()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]).expand(3, -1)
    embeddings = stock.get_input_embeddings().weight[x["input_ids"]]

    def expected():
        wide = stock(
            inputs_embeds=models.widened(embeddings, *models.parameters(model), True),
            attention_mask=models.insert(x["attention_mask"], torch.ones(3, models.M, dtype=torch.long), True),
            token_type_ids=models.insert(types, torch.zeros(3, models.M, dtype=torch.long), True),
        )
        return models.narrowed("bert-features", wide.last_hidden_state)

    assert_within_rounding(model(**x, token_type_ids=types).last_hidden_state, expected)


def test_positional_arguments():
    base = models.adapted("bert-masked")
    x = models.inputs()
    assert_within_rounding(base(x["input_ids"], x["attention_mask"]).logits, lambda: base(**x).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_sequence_in_two_parts_equals_the_whole(name, padding):
    model = models.adapted(name, position="token" if padding == "left" else "padded")
    x = models.inputs(padding=padding)
    first = model(**{k: v[:, :6] for k, v in x.items()}, use_cache=True)
    second = model(
        input_ids=x["input_ids"][:, 6:], attention_mask=x["attention_mask"], past_key_values=first.past_key_values
    )
    assert_within_rounding(second.logits, lambda: model(**x).logits[:, 6:])


def test_bart_decodes_the_shifted_input_where_nothing_else_is_given():
    import transformers
    from peft import get_peft_model

    config = transformers.BartConfig(**models.MODELS["bart"][1])
    torch.manual_seed(0)
    stock = transformers.BartModel(config).eval()
    model = get_peft_model(
        copy.deepcopy(stock), models.DePTConfig(num_virtual_tokens=models.M, r=models.R, max_length=models.S)
    ).eval()
    models.fill(model, "default", 1)
    x = models.inputs(padding="none")
    shifted = torch.cat([torch.full((3, 1), 2), x["input_ids"][:, :-1]], 1)
    assert_within_rounding(
        model(**x).last_hidden_state, lambda: model(**x, decoder_input_ids=shifted).last_hidden_state
    )


@pytest.mark.parametrize("name", ["t5", "bart", "llama", "bert-sequence"])
def test_float32_parameters_on_a_bfloat16_model(name):
    base = models.stock(name).to(torch.bfloat16)
    model = models.adapted(name, base=copy.deepcopy(base))
    assert all(p.dtype == torch.float32 for p in models.parameters(model))
    x = models.inputs()
    labels = models.targets(name, x)
    seen = {}
    embedded = model.base_model.model.dept_hooks.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    loss = model(**x, **labels).loss
    embedded.remove()
    assert seen["inputs_embeds"].dtype == torch.bfloat16
    embeddings = base.get_input_embeddings().weight[x["input_ids"]].float()
    expected = WithinRounding(
        lambda: models.widened(embeddings, *models.parameters(model), models.MODELS[name][4]).to(torch.bfloat16)
    )
    expected.check(seen["inputs_embeds"])
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in models.parameters(model))


def test_autocast():
    model = models.adapted("t5")
    x = models.inputs()
    labels = models.targets("t5", x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logits = model(**x, **labels)[:2]
    assert_within_rounding((loss, logits), lambda: model(**x, **labels)[:2], dtype=torch.bfloat16)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in models.parameters(model))
