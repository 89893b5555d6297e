"""Methods, alone and together, in typical uses of a model: every cell is right, or refused in a sentence.

A row is a combination of methods in the order in which they are added, a column a test. ``OF_PEFT`` lists the cells in
which another PEFT method fails without ours as well.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import accelerate
import pytest
import torch
from accuracy import WithinRounding, assert_same_tokens, assert_within_rounding
from combinations import (
    FROZEN,
    SEQ_2_SEQ,
    SEQ_CLS,
    Expected,
    assert_same,
    bert,
    build,
    inputs,
    put_on,
    repeated,
    result,
    t5,
)
from peft import PeftModel

ROWS = [*SEQ_2_SEQ, *SEQ_CLS, *FROZEN]
ADAPTED = [row for row in ROWS if row not in ("PiD", *FROZEN)]
OURS = ("PiD", "DePT", "PASTA", "fuse")
SEEDS = 1, 2, 3, 4
OF_PEFT = {
    "pickle": ["PiD, prompt tuning"],  # generate leaves a method on the model that unpickles into itself
    "torch.save": ["PiD, prompt tuning"],
    "offload": ["PiD, IA3", "fuse, IA3, PASTA", "PiD, prompt tuning", "PiD, prefix tuning", "DePT, prompt tuning"],
}


@cache
def expected_of(row, folder, seed=1):
    """The results of an unchanged model."""
    return Expected(build(row, folder), inputs(row, seed))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.mark.parametrize("row", [row for row in ROWS if row.startswith("PiD")])
def test_equals_the_stock_model(row, tmp_path):
    x = inputs(row)
    stock, ours = build(row, tmp_path, without=("PiD",)), build(row, tmp_path)
    got = result(ours, x)
    Expected(stock, x | {"labels": x["labels"][:2]}).check_tokens(got["tokens"])
    assert_within_rounding(got["loss"], lambda: result(stock, repeated(x), tokens=False)["loss"])


@pytest.mark.parametrize("row", ROWS)
def test_train_then_use(row, tmp_path):
    """After steps of the Trainer's default optimizer, results equal those of a model that has only had the new
    weights.
    """
    model, x = build(row, tmp_path), inputs(row)
    result(model, x)  # anything cached from the old weights is cached now
    if row == "DecT":
        with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="DecT"):
            model.train()(**x).loss.backward()
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.005, fused=True)
    losses = []
    for _ in range(6):
        loss = model.train()(**x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    fresh = build(row, tmp_path)
    fresh.load_state_dict(model.state_dict())
    assert_same(result(model.eval(), x), fresh, x)


@pytest.mark.parametrize("row", ADAPTED)
def test_merge(row, tmp_path, shared):
    """LoRA and IA3 on top merge and unmerge; methods that cannot be merged say so."""
    model, x, expected = build(row, tmp_path), inputs(row), expected_of(row, shared)
    expected.check(result(model, x))
    top = [name for name in row.split(", ") if name not in ("PiD", "fuse")][-1]
    if top in ("LoRA", "IA3"):
        model.merge_adapter()
        expected.check(result(model, x))
        model.unmerge_adapter()
        expected.check(result(model, x))
    elif "tuning" not in top:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises((NotImplementedError, ValueError), match=rf"{top[:4]}.* cannot be merged"):
                merge()
        expected.check(result(model, x))


@pytest.mark.parametrize("row", ADAPTED)
def test_save_and_load(row, tmp_path, shared):
    """The adapter on top is saved, and loaded on the model below it."""
    model, x = build(row, tmp_path), inputs(row)
    names = row.removesuffix(" on BERT").split(", ")
    top = next(name for name in reversed(names) if name not in ("PiD", "fuse"))
    model.save_pretrained(tmp_path / "adapter")
    below = build(row, tmp_path, without=(top, "fuse"))
    loaded = PeftModel.from_pretrained(below, tmp_path / "adapter").eval()
    if "fuse" in names:
        put_on(loaded, "fuse")
    expected_of(row, shared).check(result(loaded, x))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("row", ROWS)
def test_copies(row, how, tmp_path, shared):
    model, x = build(row, tmp_path), inputs(row)
    result(model, x)
    if row in OF_PEFT.get(how, []):
        stock, x = build(row, tmp_path, without=OURS), x | {"labels": x["labels"][:2]}
        result(stock, x)
        with pytest.raises(RecursionError):
            result(COPIES[how](stock), x)
        return
    twin, expected = COPIES[how](model), expected_of(row, shared)
    expected.check(result(twin, x))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    expected.check(result(model, x))


@pytest.mark.parametrize("row", ROWS)
def test_threads(row, tmp_path, shared):
    """All threads give the result of one thread, up to rounding: libraries may split a sum among as many threads as are
    free.
    """
    model = build(row, tmp_path)
    xs = [inputs(row, seed) for seed in SEEDS]
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda i: result(model, xs[i % 4]), range(24))):
            expected_of(row, shared, SEEDS[i % 4]).check(got)


@pytest.mark.parametrize("row", ROWS)
def test_autocast(row, tmp_path):
    """Losses and logits agree within the rounding of bfloat16; tokens agree in number."""
    model, x = build(row, tmp_path), inputs(row)

    @torch.no_grad()
    def numbers():
        output = model(**x)
        return output.loss, output.logits

    with torch.autocast("cpu", torch.bfloat16):
        got, tokens = numbers(), result(model, x, numbers=False).get("tokens")
    assert tokens is None or tokens.shape == (2, 6)
    assert_within_rounding(got, numbers, dtype=torch.bfloat16, runs=8)


@pytest.mark.parametrize("row", ROWS)
def test_offload(row, tmp_path, shared):
    model, x = build(row, tmp_path), inputs(row)
    if row in OF_PEFT["offload"]:
        stock, x = build(row, tmp_path, without=OURS), x | {"labels": x["labels"][:2]}
        accelerate.cpu_offload(stock, torch.device("cpu"))
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            result(stock, x)
        return
    result(model, x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    expected_of(row, shared).check(result(model, x))


@pytest.mark.parametrize("row", [row for row in ROWS if "IA3" not in row and "tuning" not in row])
def test_compile(row, tmp_path):
    """Compile one forward with a loss. With PiD it reads the values of the padding mask once."""
    model, x = build(row, tmp_path), inputs(row)
    with torch.no_grad():
        expected = WithinRounding(lambda: model(**x).loss)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=row == "Y-Tuning")
        expected.check(compiled(**x).loss)


@pytest.mark.parametrize("row", [row for row in ADAPTED if not row.endswith(("IA3", "prompt tuning", "prefix tuning"))])
def test_mixed_batch(row, tmp_path):
    """With ``adapter_names=`` each row has its adapter and its head."""
    model, x = build(row, tmp_path), inputs(row)
    x["labels"] = x["labels"][:2]
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    generator = torch.Generator().manual_seed(9)
    other = {}
    model.set_adapter("other")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
                other[name] = p
    assert other
    alone = {}

    def separate():
        for adapter in ("other", "default"):
            model.set_adapter(adapter)
            alone[adapter] = model(**x).logits.detach() if row in SEQ_CLS else result(model, x, numbers=False)["tokens"]
        return torch.stack([alone["other"][0], alone["default"][1]])

    if row in SEQ_CLS:
        got = model(**{k: v for k, v in x.items() if k != "labels"}, adapter_names=["other", "default"]).logits
        assert_within_rounding(got, separate)
    else:
        asked = {k: x[k] for k in ("input_ids", "attention_mask")}
        got = model.generate(
            **asked, num_beams=2, max_new_tokens=5, min_new_tokens=5, adapter_names=["other", "default"]
        )
        assert_same_tokens(got, separate)
    assert not torch.equal(alone["other"], alone["default"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("DePT, PASTA", "DePT|PASTA"),
        ("PASTA, DePT", "DePT|PASTA"),
        ("prompt tuning, DePT", "DePT"),
        ("prefix tuning, DePT", "DePT"),
        ("DePT, DePT", r"DePT: model has the DePT adapters \['default'\]; add_adapter\(\)"),
        ("PASTA, PASTA", r"PASTA: model has the PASTA adapters \['default'\]; add_adapter\(\)"),
        ("PASTA, prompt tuning", "PASTA: special tokens are found in input_ids"),
        ("PASTA, fuse, prompt tuning", "PASTA: special tokens are found in input_ids"),
    ],
)
def test_refused_pairs(row, message):
    model = bert()
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        for name in row.split(", "):
            model = put_on(model, name)
        result(model, inputs("PASTA"))


@torch.no_grad()
def test_prompt_tuning_above_dept():
    """Its vectors are the first tokens that DePT sees."""
    model, x = put_on(put_on(t5(), "DePT"), "prompt tuning"), inputs("DePT")
    lower, vectors = model.base_model, model.get_prompt(2)[:, :3]  # the decoder's follow
    embeddings = torch.cat([vectors, lower.get_input_embeddings()(x["input_ids"])], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), x["attention_mask"]], 1)
    settings = {"max_new_tokens": 5, "num_beams": 2}
    expected = lower.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
    assert torch.equal(
        model.generate(input_ids=x["input_ids"], attention_mask=x["attention_mask"], **settings), expected
    )
    assert not torch.equal(
        put_on(t5(), "DePT").generate(input_ids=x["input_ids"], attention_mask=x["attention_mask"], **settings),
        expected,
    )


def test_generate_below_prefix_tuning_is_refused():
    model = put_on(put_on(t5(), "DePT"), "prefix tuning")
    with pytest.raises(ValueError, match="DePT: generate below PREFIX_TUNING would leave its prompt out"):
        result(model, inputs("PiD"))


def test_nothing_is_left_of_a_refusal():
    """A model that refuses a method is unchanged."""
    model = t5()
    with pytest.raises(ValueError, match="PASTA: model must be an encoder"):
        put_on(model, "PASTA")
    x = inputs("PiD")
    assert_same(result(put_on(model, "PiD"), x), put_on(t5(), "PiD"), x)
