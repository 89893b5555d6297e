"""The parameters of all adapters, and the embeddings computed from them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..hf.peft_method import AdapterLayer, AdapterParameters
from ..ops import decomposed_prompt_embedding
from . import family, lookup
from .config import DePTConfig
from .probe import Reading


@dataclass
class Selection:
    """The adapters of one batch."""

    config: DePTConfig
    prompt: Tensor  # [m, d], or [K, m, d] where rows have different adapters
    a: Tensor  # [(K,) s, r]
    b: Tensor  # [(K,) r, d]
    adapter_ids: Tensor | None = None  # [B]; None: all rows have the same adapter
    has_base_rows: bool = False

    def delta(self) -> Tensor:  # [K, s, d]
        delta = self.config.scale * (self.a @ self.b)
        return delta if delta.ndim == 3 else delta[None]


class DePTLayer(AdapterLayer):
    """The layer at ``model.dept`` with the parameters of all adapters; the model's embedding is unchanged."""

    method = "DePT"
    shared_in_batch = ("num_virtual_tokens", "r", "max_length", "scale", "position", "insert_after_first")
    adapter_layer_names = ("dept_prompt", "dept_a", "dept_b")

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.reading: Reading | None = None  # None while the model's weights are on meta
        self.dept_prompt, self.dept_a, self.dept_b = AdapterParameters(), AdapterParameters(), AdapterParameters()

    def add(self, name: str, config: DePTConfig, *, empty: bool) -> None:
        """Add an adapter: A uniform within 1 / sqrt(r), B zero, P from tokens or N(0, 1), in at least float32.

        ``empty``: the parameters are on meta and loaded later.
        """
        embedding = self.get_base_layer()
        weight, width = embedding.weight, embedding.embedding_dim
        m, r, s = config.num_virtual_tokens, config.r, config.max_length
        kwargs = {
            "device": "meta" if empty else self.device_for_adapters(),
            "dtype": torch.promote_types(weight.dtype, torch.float32),
        }
        a = torch.empty(s, r, **kwargs).uniform_(-(r**-0.5), r**-0.5)
        b = torch.zeros(r, width, **kwargs)
        if config.init_token_ids and not empty and not config.inference_mode:
            if max(config.init_token_ids) >= weight.shape[0] or min(config.init_token_ids) < 0:
                raise ValueError(
                    f"DePTConfig: init_token_ids must lie in [0, {weight.shape[0]}), got {config.init_token_ids}"
                )
            ids = torch.tensor(config.init_token_ids, device=kwargs["device"])
            ids = ids.repeat(-(-m // len(ids)))[:m]
            with torch.no_grad():
                prompt = embedding(ids).to(**kwargs) * self._token_scale()
        else:
            prompt = torch.randn(m, width, **kwargs)
        self.configs[name] = config
        self.dept_prompt[name] = nn.Parameter(prompt)
        self.dept_a[name], self.dept_b[name] = nn.Parameter(a), nn.Parameter(b)

    def get_base_layer(self) -> nn.Module:
        return family.embedding_of(self._module[0])

    def select(self, batch: int) -> Selection:
        """The adapters for ``batch`` rows; raises as ``adapters_of`` does."""
        names, rows = self.adapters_of(batch)
        config, parameters = self.configs[names[0]], (self.dept_prompt, self.dept_a, self.dept_b)
        if rows is None:
            return Selection(config, *(lookup.gathered(p(names[0])) for p in parameters))
        stacks = [torch.stack([lookup.gathered(p(n)) for n in names]) for p in parameters]
        return Selection(config, *stacks, torch.tensor(rows).to(stacks[0].device, non_blocking=True), -1 in rows)

    def embed(
        self, selection: Selection, input_ids: Tensor | None, inputs_embeds: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        """Embeddings (B, m + L, d) of the prompt and the updated ``input_ids`` or ``inputs_embeds`` (B, L, d)."""
        divisor = self._model_scale(input_ids)
        if input_ids is not None:
            weight, factor, ids = lookup.table(self.get_base_layer(), input_ids)
            factor *= self._token_scale() / divisor
        else:
            weight, factor = inputs_embeds.flatten(0, 1), 1.0
            ids = torch.arange(len(weight), device=weight.device).view(inputs_embeds.shape[:2])
        config = selection.config
        return decomposed_prompt_embedding(
            ids,
            weight,
            selection.prompt if divisor == 1 else selection.prompt / divisor,
            selection.a,
            selection.b,
            scale=config.scale / divisor,
            embed_scale=factor,
            offsets=offsets,
            insert_after_first=config.insert_after_first,
            adapter_ids=selection.adapter_ids,
        )

    def embed_next(
        self, delta: Tensor, adapter_ids: Tensor | None, input_ids: Tensor, column: int, offsets: Tensor | None
    ) -> Tensor:
        """Embeddings (B, q, d) of tokens that continue an input at ``column``, not counting the prompt.

        ``delta`` is (K, s, d).
        """
        divisor = self._model_scale(None)
        weight, factor, ids = lookup.table(self.get_base_layer(), input_ids)
        batch, tokens = input_ids.shape
        index = torch.arange(column, column + tokens, device=weight.device).expand(batch, -1)  # [B, q]
        if offsets is not None:
            index = index - offsets[:, None]
        adapter = torch.zeros(batch, dtype=torch.long, device=weight.device) if adapter_ids is None else adapter_ids
        updated = (index >= 0) & (index < delta.shape[1]) & (adapter >= 0)[:, None]
        low_rank = delta[adapter.clamp_min(0)[:, None], index.clamp(0, delta.shape[1] - 1)]
        low_rank = low_rank.masked_fill(~updated[..., None], 0)
        factor *= self._token_scale() / divisor
        return (factor * weight[ids].to(low_rank.dtype) + low_rank / divisor).to(weight.dtype)

    def _token_scale(self) -> float:
        """The factor from the embedding module's output to the first layer's input."""
        return 1.0 if self.reading is None else self.reading.token_scale

    def _model_scale(self, input_ids: Tensor | None) -> float:
        """The factor by which the model multiplies ``inputs_embeds``, or its own embeddings if it needs ids."""
        if self.reading is None:
            return 1.0
        return self.reading.token_scale if self.reading.by_ids and input_ids is not None else self.reading.input_scale
