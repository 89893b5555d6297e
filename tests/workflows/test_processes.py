"""Several processes: gradients under DDP and FSDP2 are the mean of those of each process's inputs."""

import pytest
import ranks
from torch import multiprocessing

ROWS = ["PiD, LoRA", "PiD, DePT", "DePT", "DePT on BERT", "PASTA", "PASTA, fuse", "LoRA, PASTA, fuse", "Y-Tuning"]


@pytest.mark.parametrize("wrap", [ranks.ddp, ranks.fsdp2])
def test_two_processes(wrap, tmp_path):
    multiprocessing.spawn(ranks.rank, (2, ROWS, wrap, tmp_path), nprocs=2)
