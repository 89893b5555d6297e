"""A file of features with a key of everything they depend on; it may hold only the first rows."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from ..hf import durable
from ..hf.fingerprint import digest_of

NAME = "peft_kernels.dect features"
FORMAT = f"{NAME} 2"
# the start of our files behind the first eight bytes, in the current format and in the previous one
BEGINNINGS = (f'{{"__metadata__":{{"{NAME}', f'{{"__metadata__":{{"format":"{NAME}')
logger = logging.get_logger(__name__)


class FeatureFile:
    """A safetensors file with the finished rows, in the order in which they are computed.

    Raises:
        ValueError: ``path`` exists and is not a cache of features.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = Path(path), key
        if self.path.exists() and not (self.path.is_file() and self._ours()):
            raise ValueError(
                f"DecT: cache must be a new file or one that extract has written, got {str(path)!r}, which holds"
                " something else"
            )

    def read(self) -> dict[str, Tensor] | None:
        """The finished rows; None if there are none, if the file is damaged, or if its key differs."""
        if not self.path.exists() or not self.path.stat().st_size:
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            if about.get("key") != self.key:
                return None
            tensors = load_file(self.path)
            if digest_of(tensors) == about["digest"]:
                return tensors
        except (SafetensorError, ValueError, KeyError, AttributeError):
            pass
        logger.warning(f"DecT: {self.path} is damaged; its features are made again")
        return None

    def check_writable(self) -> None:
        durable.check_writable("DecT: cache", self.path)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write the finished rows atomically."""
        about = json.dumps({"key": self.key, "digest": digest_of(tensors)})
        durable.replace(self.path, lambda part: save_file(tensors, part, metadata={FORMAT: about}))

    def _ours(self) -> bool:
        with self.path.open("rb") as file:
            found = file.read(100)
        return (
            not found or len(found) > 8 and any(found[8:].startswith(x[: len(found) - 8].encode()) for x in BEGINNINGS)
        )
