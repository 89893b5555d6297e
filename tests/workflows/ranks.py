"""Processes that train combinations of methods together, over gloo."""

from datetime import timedelta

import torch
from accuracy import assert_within_rounding
from combinations import build, inputs
from torch import distributed


def gradients(model, x) -> dict:
    """The gradients of the trained parameters, gathered if they are sharded."""
    model.zero_grad()
    model.train()(**x).loss.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def alone(models: dict, ranks: int) -> dict:
    """The mean of the gradients of all ranks' inputs, in one process."""
    means = {}
    for row, model in models.items():
        each = [gradients(model, inputs(row, seed)) for seed in range(ranks)]
        means[row] = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in each[0]}
    return means


def ddp(model):
    return torch.nn.parallel.DistributedDataParallel(model)


def fsdp2(model):
    return distributed.fsdp.fully_shard(
        model, mesh=distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
    )


def rank(number: int, ranks: int, rows: list[str], wrap, folder) -> None:
    """Raise if the gradients differ from those of one process."""
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), ranks)
    distributed.init_process_group("gloo", store=store, rank=number, world_size=ranks, timeout=timedelta(seconds=120))
    (own := folder / str(number)).mkdir()
    try:
        models = {row: build(row, own) for row in rows}
        together = {row: gradients(wrap(build(row, own)), inputs(row, number)) for row in rows}
        assert_within_rounding(together, lambda: alone(models, ranks))
    finally:
        distributed.destroy_process_group()
