"""The cache of features: ragged safetensors shards in a folder, with an index."""

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..hf import durable
from ..hf.fingerprint import fingerprint
from ..hf.frozen import eval_mode, integer, max_length_of, strings
from .backbone import encoder_of, features_of

__all__ = ["FORMAT", "INDEX", "cache_features", "checksum", "checksum_of_text", "read_index"]

INDEX = "index.json"
SHARD = re.compile(r"features-\d{5,}\.safetensors")
FORMAT = 2
SHARD_TOKENS = 1 << 16
logger = logging.get_logger(__name__)


def cache_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
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

    Texts are sorted by length, so that batches have little padding, and divided into shards. A shard is written
    atomically and then entered in the index with its SHA-256, so that an interrupted run continues after the last
    complete shard when called again. Existing shards are checked; damaged or missing ones are computed again. A second
    process with the same folder waits for the first.

    Args:
        model: the backbone, without its head if it has one; the encoder of an encoder-decoder model; a PEFT model with
            its active adapter. It runs in eval mode on its own device.
        tokenizer: the model's tokenizer.
        texts: strings, or pairs of strings, in any ordered iterable.
        folder: folder of shards and index; created if it does not exist.
        batch_size: texts per forward.
        dtype: dtype of the stored features, ``torch.bfloat16`` or ``torch.float32``.
        layer: index into the model's ``hidden_states``; -1: the last.
        max_length: the most tokens of a text; longer ones are cut. None: the limit of model and tokenizer.
        overwrite: whether to replace a cache of another model, tokenizer or texts; False: raise an error.

    The key of a cache is a digest of the weights, config, active adapters and autocast of the model, the token ids of
    all texts, ``dtype`` and ``layer``.

    Raises:
        ValueError: ``dtype``, ``layer`` or ``batch_size`` is out of range; ``folder`` has a cache with another key,
            cannot be written, or has another kind of index.
        TypeError: ``model`` is not a transformers model, or ``texts`` are not strings or pairs of strings.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"cache_features: dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    batch_size = integer("cache_features", "batch_size", batch_size, 1)
    folder = Path(folder)
    model = encoder_of("cache_features", model)
    layers = getattr(model.config, "num_hidden_layers", None)
    if layers is not None and not -layers - 1 <= layer <= layers:
        raise ValueError(f"cache_features: layer must lie in [{-layers - 1}, {layers}], got {layer}")
    texts = strings("cache_features", "texts", texts, pairs=True)
    if max_length is None:
        limit = max_length_of(model, tokenizer, None)
    else:
        limit = integer("cache_features", "max_length", max_length, 1)
    encoded = _encode(tokenizer, texts, limit)
    key = fingerprint(model, model, [str(dtype), layer, encoded])
    header = {"format": FORMAT, "key": key, "texts": len(encoded), "dtype": str(dtype).removeprefix("torch.")}
    durable.check_writable("cache_features: folder", folder / INDEX)
    with _locked(folder):
        _write_shards(model, tokenizer, encoded, folder, header, batch_size, dtype, layer, overwrite)
    return folder


def _locked(folder: Path) -> FileLock:
    """Lock ``folder`` for one process or thread; a killed process releases its lock."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"cache_features: another process writes {folder}; this one waits for it")
        lock.acquire()
    return lock


def _write_shards(model, tokenizer, encoded, folder, header, batch_size, dtype, layer, overwrite):
    lengths = [len(row["input_ids"]) for row in encoded]
    plan = _shards(lengths)
    done = _finished_shards(folder, header, overwrite)
    for number, rows in enumerate(plan):
        name = f"features-{number:05d}.safetensors"
        if done.get(name) is not None and done[name] == checksum(folder / name):
            continue
        done.pop(name, None)
        _write_index(folder, header, len(plan), done)
        features = _features(model, tokenizer, [encoded[i] for i in rows], batch_size, layer).to(dtype)
        offsets = torch.tensor([0, *(lengths[i] for i in rows)]).cumsum(0)
        checksums = [checksum_of_text(features[begin:end]) for begin, end in offsets.unfold(0, 2, 1).tolist()]
        tensors = {
            "features": features,
            "rows": torch.tensor(rows),
            "offsets": offsets,
            "checksums": torch.tensor(checksums, dtype=torch.int64),
        }
        durable.replace(folder / name, lambda part, tensors=tensors: save_file(tensors, part))
        done[name] = checksum(folder / name)
        _write_index(folder, header, len(plan), done)
    _write_index(folder, header, len(plan), done)


def read_index(folder: Path) -> dict | None:
    """The index in ``folder``, in this format or an earlier one; None if there is none or it cannot be read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        types = {"format": int, "done": dict, "key": str}
        return index if all(isinstance(index[name], kind) for name, kind in types.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checksum_of_text(features: Tensor) -> int:
    """CRC-32 of one text's features (n, d), fast enough to check on every read."""
    return zlib.crc32(features.contiguous().view(torch.uint8).numpy().data)


def checksum(path: Path) -> str | None:
    """SHA-256 of the file at ``path``; None if there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_index(folder, header, shards, done):
    content = json.dumps({**header, "shards": shards, "done": dict(sorted(done.items()))}, indent=1)
    durable.replace(folder / INDEX, lambda part: part.write_text(content + "\n", encoding="utf-8"))


def _finished_shards(folder, header, overwrite) -> dict:
    """The finished shards of a previous run with the same key, from its index."""
    index = read_index(folder)
    shards = [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]
    if index is None:
        if (folder / INDEX).exists() and not shards:
            raise ValueError(
                f"cache_features: folder must be new or written by cache_features, got {folder}, whose {INDEX} is"
                " something else"
            )
        return {}
    if index["key"] == header["key"] and index["format"] == FORMAT:
        return index["done"]
    if not overwrite:
        raise ValueError(
            f"cache_features: {folder} holds features of another model, tokenizer or texts, or of another dtype, layer"
            " or max_length; pass overwrite=True to replace them, or another folder"
        )
    for path in shards:
        path.unlink()
    return {}


def _encode(tokenizer, texts, max_length):
    if not texts:
        return []
    arguments = (texts,) if isinstance(texts[0], str) else tuple(map(list, zip(*texts)))
    encoded = tokenizer(*arguments, truncation=max_length is not None, max_length=max_length, padding=False)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return [dict(zip(names, row)) for row in zip(*(encoded[name] for name in names))]


def _shards(lengths) -> list[list[int]]:
    """Indices of the texts, sorted by length and divided into shards of at most SHARD_TOKENS tokens (or one text)."""
    shards: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not shards or tokens + lengths[i] > SHARD_TOKENS:
            shards.append([])
            tokens = 0
        shards[-1].append(i)
        tokens += lengths[i]
    return shards


def _features(model, tokenizer, rows, batch_size, layer):
    """Features of the tokens of all rows, (total, d), on the CPU."""
    rows = [row for row in rows if row["input_ids"]]  # a text without tokens has no features
    if not rows:
        return torch.zeros(0, model.config.hidden_size)
    with eval_mode(model):
        starts = range(0, len(rows), batch_size)
        return torch.cat([_batch(model, tokenizer, rows[i : i + batch_size], layer) for i in starts])


def _batch(model, tokenizer, rows, layer):
    # accelerate's hooks fetch offloaded weights and move the inputs
    device = None if model.device.type == "meta" else model.device
    ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    mask = pad_sequence(ones, batch_first=True).to(device)
    fill = {"input_ids": tokenizer.pad_token_id or 0, "token_type_ids": 0}
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    inputs = {name: pad_sequence(column, True, fill[name]).to(device) for name, column in columns.items()}
    features = features_of(model, layer, attention_mask=mask, **inputs)
    if features.shape[:2] != mask.shape:
        raise ValueError(
            f"cache_features: model must return a feature for each of {mask.shape[1]} tokens, got {features.shape[1]}"
        )
    return features[mask.bool().to(features.device)].cpu()
