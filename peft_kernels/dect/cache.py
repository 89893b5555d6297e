"""Features in a file that knows what they were made from, and how far it got."""

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
# how a file of ours begins, behind eight bytes: that of today, and that of before
BEGINNINGS = (f'{{"__metadata__":{{"{NAME}', f'{{"__metadata__":{{"format":"{NAME}')
logger = logging.get_logger(__name__)


class FeatureFile:
    """A safetensors file with the rows that are done, in the order in which they are made.

    Raises:
        ValueError: something is at ``path`` that is no cache of features.
    """

    def __init__(self, path: str | Path, key: str):
        self.path, self.key = Path(path), key
        if self.path.exists() and not (self.path.is_file() and self._ours()):
            raise ValueError(f"DecT: cache must be a new file or one that extract has written, got {str(path)!r}, which holds something else")

    def read(self) -> dict[str, Tensor] | None:
        """The rows that are done; None where there are none, or where they are damaged or made from anything else."""
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
        """All of it or nothing."""
        about = json.dumps({"key": self.key, "digest": digest_of(tensors)})
        durable.replace(self.path, lambda part: save_file(tensors, part, metadata={FORMAT: about}))

    def _ours(self) -> bool:
        with self.path.open("rb") as file:
            found = file.read(100)
        return not found or len(found) > 8 and any(found[8:].startswith(x[: len(found) - 8].encode()) for x in BEGINNINGS)
