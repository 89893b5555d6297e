"""Features computed once: ragged safetensors shards in a folder, with an index."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from .backbone import features_of

__all__ = ["INDEX", "cache_features", "checksum", "read_index"]

INDEX = "index.json"
FORMAT = 1
SHARD_TOKENS = 1 << 16


def cache_features(
    model,
    tokenizer,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    folder: str | Path,
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    layer: int = -1,
    max_length: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the hidden states of every text to ``folder``, for ``CachedFeatures`` to read; returns the folder.

    Texts are sorted by length, in batches with little padding, and divided into shards; the index says where each text went. A shard is
    written beside its place and then moved there, and only then entered in the index with its SHA-256: an interrupted run continues
    after the last whole shard when called again. Shards that are there are checked; damaged or missing ones are computed again.

    Args:
        model: the backbone; it runs as it is, in eval mode, on its device.
        tokenizer: the model's.
        texts: strings, or pairs of strings.
        dtype: what is stored: ``torch.bfloat16`` or ``torch.float32``.
        layer: which hidden states, counted as in ``hidden_states``; -1: the last.
        max_length: tokens of a text; longer ones are cut. None: the tokenizer's own limit.
        overwrite: replace a cache that was made of another model, tokenizer or texts. False: refuse it.

    The key of a cache is a SHA-256 over the weights and config of the model, the token ids of all texts, ``dtype`` and ``layer``.

    Raises:
        ValueError: ``dtype`` or ``batch_size`` out of range; or a cache in ``folder`` that was made of something else.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"cache_features: dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    if batch_size < 1:
        raise ValueError(f"cache_features: batch_size must be at least 1, got {batch_size}")
    folder = Path(folder)
    encoded = _encode(tokenizer, texts, max_length)
    lengths = [len(row["input_ids"]) for row in encoded]
    plan = _shards(lengths)
    head = {"format": FORMAT, "key": _key(model, encoded, dtype, layer), "texts": len(encoded), "dtype": str(dtype).removeprefix("torch.")}
    done = _continue(folder, head, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(plan):
        name = f"features-{number:05d}.safetensors"
        if done.get(name) is not None and done[name] == checksum(folder / name):
            continue
        done.pop(name, None)
        _write_index(folder, head, len(plan), done)
        tensors = {"features": _features(model, tokenizer, [encoded[i] for i in rows], batch_size, layer).to(dtype)}
        tensors |= {"rows": torch.tensor(rows), "offsets": torch.tensor([0, *(lengths[i] for i in rows)]).cumsum(0)}
        save_file(tensors, folder / f"{name}.part")
        done[name] = checksum(folder / f"{name}.part")
        os.replace(folder / f"{name}.part", folder / name)
        _write_index(folder, head, len(plan), done)
    _write_index(folder, head, len(plan), done)
    return folder


def read_index(folder: Path) -> dict | None:
    """None where there is none that can be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return index if index["format"] == FORMAT and isinstance(index["done"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checksum(path: Path) -> str | None:
    """None where there is no file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_index(folder, head, shards, done):
    content = json.dumps({**head, "shards": shards, "done": dict(sorted(done.items()))}, indent=1)
    (folder / f"{INDEX}.part").write_text(content + "\n", encoding="utf-8")
    os.replace(folder / f"{INDEX}.part", folder / INDEX)


def _continue(folder, head, overwrite) -> dict:
    """The shards of a former run with the same key."""
    index = read_index(folder)
    if index is None:
        return {}
    if index["key"] == head["key"]:
        return index["done"]
    if not overwrite:
        raise ValueError(
            f"cache_features: {folder} holds features of another model, tokenizer or texts, or of another dtype, layer or max_length;"
            " give overwrite=True to replace them, or another folder"
        )
    for path in folder.glob("features-*.safetensors"):
        path.unlink()
    return {}


def _encode(tokenizer, texts, max_length):
    if not texts:
        return []
    pairs = not isinstance(texts[0], str)
    arguments = tuple(map(list, zip(*texts))) if pairs else (list(texts),)
    encoded = tokenizer(*arguments, truncation=True, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [dict(zip(names, row)) for row in zip(*(encoded[name] for name in names))]


def _shards(lengths) -> list[list[int]]:
    """Texts by length, in shards of about SHARD_TOKENS."""
    shards, tokens = [], SHARD_TOKENS
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if tokens + lengths[i] > SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(i)
        tokens += lengths[i]
    return shards


def _key(model, encoded, dtype, layer) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, str(dtype), layer, model.config.to_diff_dict(), encoded], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _features(model, tokenizer, rows, batch_size, layer):
    """(tokens of all rows, d), on the CPU."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([_batch(model, tokenizer, rows[i : i + batch_size], layer) for i in range(0, len(rows), batch_size)])
    finally:
        model.train(was_training)


def _batch(model, tokenizer, rows, layer):
    device = model.device
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True).to(device)
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": 0}
    inputs = {name: pad_sequence([torch.tensor(row[name]) for row in rows], True, fill[name]).to(device) for name in rows[0]}
    return features_of(model, layer, attention_mask=mask, **inputs)[mask.bool()].cpu()
