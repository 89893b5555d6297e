"""Cached features for a Trainer: a Dataset over memory-mapped shards, and a collator that pads them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..hf.frozen import class_indices
from .cache import FORMAT, checksum, checksum_of_text, read_index

__all__ = ["CachedFeatures", "FeatureCollator"]


class CachedFeatures(Dataset):
    """Dataset of the texts in a folder of ``cache_features``: items ``{"features": (n, d), "labels": ...}``.

    Shards are memory-mapped: only the items that are read are loaded, and worker processes share them. The features of
    an item are compared with their checksum when it is read.

    Args:
        folder: the folder that ``cache_features`` wrote.
        labels: the class index of every text, in any iterable; None: items have only features.
        verify: compare every shard with its checksum now, which reads all of them.

    Raises:
        ValueError: the folder has no cache, or one that is incomplete or damaged; the number of labels is wrong, or
            they are not whole numbers. Reading an item with damaged features raises it too.
    """

    def __init__(self, folder: str | Path, labels: Sequence[int] | None = None, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise ValueError(f"CachedFeatures: {folder} has no index of features: run cache_features")
        if index["format"] != FORMAT:
            raise ValueError(
                f"CachedFeatures: {folder} was written by an earlier version: run cache_features with overwrite=True"
            )
        if len(index["done"]) < index["shards"]:
            raise ValueError(
                f"CachedFeatures: {folder} has {len(index['done'])} of {index['shards']} shards: run cache_features"
                " again to continue"
            )
        labels = None if labels is None else class_indices("CachedFeatures", labels)
        if labels is not None and len(labels) != index["texts"]:
            raise ValueError(
                f"CachedFeatures: labels must be one for each of {index['texts']} texts, got {len(labels)}"
            )
        self.labels = labels
        self.names = sorted(index["done"])
        for name in self.names:
            path = self.folder / name
            if not path.exists() or (verify and checksum(path) != index["done"][name]):
                raise ValueError(
                    f"CachedFeatures: {path} is damaged or missing: run cache_features again, which repairs it"
                )
        self._shards: list[Tensor] | None = None
        self._locations = torch.zeros(index["texts"], 4, dtype=torch.long)  # shard, begin, end, checksum
        for number in range(len(self.names)):
            _, rows, offsets, sums = self._tensors(number)
            self._locations[rows] = torch.stack((torch.full_like(rows, number), offsets[:-1], offsets[1:], sums), 1)

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, i: int) -> dict:
        shard, begin, end, checksum = self._locations[i].tolist()
        if self._shards is None:
            self._shards = [self._tensors(number)[0] for number in range(len(self.names))]
        item = {"features": self._shards[shard][begin:end]}
        if checksum_of_text(item["features"]) != checksum:
            raise ValueError(
                f"CachedFeatures: {self.folder / self.names[shard]} is damaged: run cache_features again, which repairs"
                " it"
            )
        return item if self.labels is None else {**item, "labels": self.labels[i]}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": None}  # a worker maps the files itself

    @property
    def lengths(self) -> list[int]:
        """The number of features of every text."""
        return (self._locations[:, 2] - self._locations[:, 1]).tolist()

    def _tensors(self, number):
        try:
            with safe_open(self.folder / self.names[number], framework="pt") as shard:
                return tuple(shard.get_tensor(name) for name in ("features", "rows", "offsets", "checksums"))
        except Exception as error:  # safetensors raises its own exception type
            raise ValueError(
                f"CachedFeatures: {self.folder / self.names[number]} is damaged: run cache_features again, which"
                " repairs it"
            ) from error


class FeatureCollator:
    """Collates items to a batch for ``YTuningForSequenceClassification``.

    A batch has ``features`` padded on the right, ``lengths``, and ``labels`` if the items have them.
    """

    def __call__(self, items: list[dict]) -> dict:
        features = [item["features"] for item in items]
        batch = {
            "features": pad_sequence(features, batch_first=True),
            "lengths": torch.tensor([len(x) for x in features]),
        }
        if "labels" in items[0]:
            batch["labels"] = torch.tensor([item["labels"] for item in items])
        return batch
