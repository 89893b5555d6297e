"""Features in a file that knows what they were made from."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "peft_kernels.dect features 1"
SAMPLES = 64  # elements of every weight


def key_of(model, **inputs) -> str:
    """A digest of the model's class, configuration and weights (some of each), and of ``inputs``, which json can write."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps([FORMAT, type(model).__name__, config, inputs], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)].to(torch.float64 if flat.is_floating_point() else torch.int64)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def read(path: Path, key: str) -> dict[str, Tensor] | None:
    """What the file holds; None where there is none, or where it was made from anything else."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
        return load_file(path)
    except SafetensorError:  # a file cut short
        return None


def write(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """All of it or nothing: a run that is stopped leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished, metadata={"format": FORMAT, "key": key})
    os.replace(unfinished, path)
