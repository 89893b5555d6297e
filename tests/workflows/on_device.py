"""The rows of the matrix on a device: results and gradients are those on the CPU, which the matrix holds against stock
models.

Not collected by default: ``pytest tests/workflows/on_device.py --device cuda``, as scripts/gpu_check.sh runs it.
"""

import copy

import pytest
import torch
from accuracy import WithinRounding
from combinations import FROZEN, SEQ_2_SEQ, SEQ_CLS, Expected, build, inputs, result


def moved(values: dict, device) -> dict:
    return {name: x.to(device) for name, x in values.items()}


def gradients(model, x) -> dict:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(**x).loss, list(parameters.values()), allow_unused=True)
    return {name: g.cpu() for name, g in zip(parameters, found) if g is not None}


@pytest.mark.parametrize("row", [*SEQ_2_SEQ, *SEQ_CLS, *FROZEN])
def test_results_and_gradients(row, tmp_path, device):
    model, x = build(row, tmp_path), inputs(row)
    there = copy.deepcopy(model).to(device)
    Expected(model, x).check(moved(result(there, moved(x, device)), "cpu"))
    if row != "DecT":  # it is frozen
        WithinRounding(lambda: gradients(model, x)).check(gradients(there, moved(x, device)))


@pytest.mark.parametrize("row", [row for row in SEQ_2_SEQ if row.startswith("PiD") and "tuning" not in row])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(row, cache, tmp_path, device):
    """A static cache makes transformers compile the step on a GPU."""
    model = build(row, tmp_path)
    there = copy.deepcopy(model).to(device)
    for seed in (1, 2):
        asked = {k: v for k, v in inputs(row, seed).items() if k != "labels"}
        for beams in (1, 3):
            ids = torch.tensor([[0, 5], [0, 6], [0, 7], [0, 8]])
            settings = {"num_beams": beams, "max_new_tokens": 8, "min_new_tokens": 8}
            expected = model.generate(**asked, decoder_input_ids=ids, **settings)
            got = there.generate(
                **moved(asked, device), decoder_input_ids=ids.to(device), cache_implementation=cache, **settings
            )
            assert torch.equal(got.cpu(), expected)
