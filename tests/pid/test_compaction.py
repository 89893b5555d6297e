"""Finished streams are no longer decoded once most have finished; only the time changes."""

import pytest
import torch
from models import EOS, TEXT_FAMILIES, build, decided, inputs, start_of
from transformers import LogitsProcessor, LogitsProcessorList

from peft_kernels import pid
from peft_kernels.pid.generation import drops_finished

STEPS = 20


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


def run(model, x, steps, **kwargs):
    """The output, and the number of rows of every decoder call."""
    rows = []
    handle = model.get_decoder().register_forward_hook(
        lambda module, args, out: rows.append(out[0].shape[0]), always_call=True
    )
    torch.manual_seed(7)
    try:
        processors = LogitsProcessorList([EarlyEnds(steps)])
        return model.generate(
            **x, max_new_tokens=STEPS, no_repeat_ngram_size=2, logits_processor=processors, **kwargs
        ), rows
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "kwargs",
    [{"decoder_input_ids": "three"}, {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}],
    ids=["greedy", "sampling"],
)
@pytest.mark.parametrize(
    "ends",
    [[2, 3, 99, 1, 5, 6, 99, 0, 1], [9, 99, 9, 9, 9, 9, 1, 1, 1], [1] * 9],
    ids=["early", "twice", "all-at-once"],
)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokens_are_stock_from_fewer_rows(family, ends, kwargs, swapped):
    model, x = build(family), inputs()
    repeated, kwargs = x, dict(kwargs)
    if "decoder_input_ids" in kwargs:
        kwargs["decoder_input_ids"] = torch.tensor([[start_of(model), 5, u + 6] for u in range(9)])
        repeated = {k: v.repeat_interleave(3, 0) for k, v in x.items()}
    stock, stock_rows = decided(model, lambda: run(model, repeated, ends, **kwargs), of=lambda output: output[0])
    ours, rows = run(swapped(model), x, ends, **kwargs)
    assert torch.equal(ours, stock)
    assert set(stock_rows) == {9} and len(rows) == len(stock_rows)
    unfinished = [sum(end >= step for end in ends) for step in range(len(rows))]
    assert all(alive <= count for alive, count in zip(unfinished, rows))
    if ends != [1] * 9:  # there all end before the first check
        assert min(rows) == min(unfinished) < 9 and sum(rows) < 0.7 * sum(stock_rows)


@pytest.mark.parametrize("family", ["t5", "bart", "encoder-decoder"])
def test_ragged_prompts_and_streams(family, swapped):
    model, x = swapped(build(family)), inputs()
    prompts = [[[5, 6]], [[7], [8, 9, 10, 11], [12]], [[13, 14], [15]]]
    ends = [3, 99, 2, 1, 99, 0]
    rows = []
    settings = dict(prompts=prompts, **x, max_new_tokens=STEPS)
    handle = model.get_decoder().register_forward_hook(lambda module, args, out: rows.append(out[0].shape[0]))
    ours = pid.generate(model, **settings, logits_processor=LogitsProcessorList([EarlyEnds(ends)]))
    dropped, rows[:] = rows.copy(), []
    # drops nothing
    scored = pid.generate(
        model, **settings, logits_processor=LogitsProcessorList([EarlyEnds(ends)]), output_scores=True
    )
    handle.remove()
    assert ours.sequences == scored.sequences
    assert min(dropped) == 2 and set(rows) == {6}
    assert [len(s) for one in ours.sequences for s in one] == [min(end + 1, STEPS) for end in ends]


def test_off_if_asked_and_on_a_gpu(swapped):
    """There a look at the tokens would make every fourth step wait."""
    ends, kwargs = [0, 1, 1, 99, 1, 1, 1, 1, 1], {"do_sample": True, "num_return_sequences": 3}
    model = swapped(build("t5"), drop_finished=False)
    assert set(run(model, inputs(), ends, **kwargs)[1]) == {9}
    assert min(run(pid.enable(model), inputs(), ends, **kwargs)[1]) == 1
    assert not drops_finished(None, torch.device("cuda")) and drops_finished(True, torch.device("cuda"))


@pytest.mark.parametrize(
    "asked_for", [{"output_scores": True}, {"output_logits": True}, {"output_hidden_states": True}, {"num_beams": 3}]
)
def test_off_where_every_row_is_wanted(asked_for, swapped):
    ends = [0, 1, 1, 99, 1, 1, 1, 1, 1]
    repeats = (
        {"num_return_sequences": 3} if "num_beams" in asked_for else {"do_sample": True, "num_return_sequences": 3}
    )
    _, rows = run(swapped(build("t5")), inputs(), ends, return_dict_in_generate=True, **asked_for, **repeats)
    assert set(rows) == {9}


def test_static_caches_keep_their_rows(swapped):
    """Their tensors cannot shrink."""
    ends = [0, 1, 1, 99, 1, 1, 1, 1, 1]
    kwargs = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3, "cache_implementation": "static"}
    model = build("bart")
    stock, _ = decided(model, lambda: run(model, inputs(), ends, **kwargs), of=lambda output: output[0])
    ours, rows = run(swapped(model), inputs(), ends, **kwargs)
    assert torch.equal(ours, stock) and set(rows) == {9}
