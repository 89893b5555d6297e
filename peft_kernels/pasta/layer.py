"""The parameters of all adapters."""

from dataclasses import dataclass

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..hf.peft_method import AdapterLayer, AdapterParameters
from .config import PASTAConfig

_STD = 0.02


@dataclass
class Selection:
    """The adapters of one batch."""

    config: PASTAConfig
    special_ids: Tensor  # [n]
    vectors: tuple[Tensor, ...]  # L tensors [P, d], or [K, P, d] where rows have different adapters
    adapter_ids: Tensor | None = None  # [B]; None: all rows have the same adapter
    has_base_rows: bool = False


class PASTALayer(AdapterLayer):
    """The layer at ``model.pasta`` with the parameters of all adapters."""

    method = "PASTA"
    shared_in_batch = ("num_special_tokens", "special_token_ids", "overflow", "dropout")
    adapter_layer_names = ("pasta_vectors",)
    other_param_names = ("configs", "special_ids")

    def __init__(self, module: nn.Module, passes: int):
        super().__init__(module)
        self.passes = passes
        self.pasta_vectors = AdapterParameters()  # [L, P, d]
        self.special_ids = BufferDict(persistent=False)

    def add(self, name: str, config: PASTAConfig, *, empty: bool) -> None:
        """Add an adapter, at least float32. ``empty``: on meta, loaded later."""
        device, width = self.device_for_adapters(), self._module[0].config.hidden_size
        kwargs = {
            "device": "meta" if empty else device,
            "dtype": torch.promote_types(self.get_base_layer().weight.dtype, torch.float32),
        }
        vectors = torch.zeros(self.passes, config.num_special_tokens, width, **kwargs)
        if config.init == "normal":
            vectors.normal_(std=_STD)
        self.configs[name] = config
        self.special_ids[name] = torch.tensor(config.special_token_ids, device=device)
        self.pasta_vectors[name] = nn.Parameter(vectors)

    def select(self, batch: int) -> Selection:
        """The adapters for ``batch`` rows; raises as ``adapters_of`` does."""
        names, rows = self.adapters_of(batch)
        config, special_ids = self.configs[names[0]], self.special_ids[names[0]]
        if rows is None:
            return Selection(config, special_ids, self.pasta_vectors(names[0]).unbind(0))
        vectors = torch.stack([self.pasta_vectors(n) for n in names], 1).unbind(0)
        adapter_ids = torch.tensor(rows).to(special_ids.device, non_blocking=True)
        return Selection(config, special_ids, vectors, adapter_ids, -1 in rows)
