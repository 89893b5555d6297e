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
# the start of a cache behind its first eight bytes, in the current and the previous format
PREFIXES = (f'{{"__metadata__":{{"{NAME}', f'{{"__metadata__":{{"format":"{NAME}')
logger = logging.get_logger(__name__)


class FeatureFile:
    """A safetensors file with the finished rows, in the order in which they are computed.

    Raises:
        ValueError: ``path`` exists and is not a cache of features.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = Path(path), key
        if self.path.exists() and not (self.path.is_file() and self._is_cache()):
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
                header = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
            if header.get("key") != self.key:
                return None
            tensors = load_file(self.path)
            if digest_of(tensors) == header["digest"]:
                return tensors
        except (SafetensorError, ValueError, KeyError, AttributeError):
            pass
        logger.warning(f"DecT: {self.path} is damaged; its features are computed again")
        return None

    def check_writable(self) -> None:
        durable.check_writable("DecT: cache", self.path)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write the finished rows atomically."""
        header = json.dumps({"key": self.key, "digest": digest_of(tensors)})
        durable.replace(self.path, lambda part: save_file(tensors, part, metadata={FORMAT: header}))

    def _is_cache(self) -> bool:
        """Whether the file is empty or begins as a cache does, perhaps cut short."""
        with self.path.open("rb") as file:
            size, start = file.read(8), file.read(92)
        return not size or bool(start) and any(start.startswith(x[: len(start)].encode()) for x in PREFIXES)
