"""Conversion of checkpoints from the authors' code, a fork of an old PEFT."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import DePTConfig

_KEYS = {
    "prompt_embeddings": "base_model.model.dept.dept_prompt",
    "prompt_encoder.lora_embedding_A": "base_model.model.dept.dept_a",
    "prompt_encoder.lora_embedding_B": "base_model.model.dept.dept_b",
}


def load_official(folder: str | Path) -> tuple[DePTConfig, dict[str, Tensor]]:
    """Read a folder with the ``adapter_config.json`` and ``adapter_model.bin`` that the authors' code writes.

    Returns:
        The configuration, and the parameters under PEFT's names: ``peft.set_peft_model_state_dict(model, state)`` loads
        them into a model that was made with the configuration.

    Raises:
        ValueError: the checkpoint is of another method, lacks parameters, or has shapes that differ from its
            configuration.
    """
    folder = Path(folder)
    official = json.loads((folder / "adapter_config.json").read_text())
    if official.get("peft_type") != "PROMPT_TUNING_LORA":
        raise ValueError(
            f"load_official: peft_type must be 'PROMPT_TUNING_LORA' in {folder}, got {official.get('peft_type')!r}"
        )
    config = DePTConfig(
        task_type=official.get("task_type"),
        base_model_name_or_path=official.get("base_model_name_or_path"),
        num_virtual_tokens=official["num_virtual_tokens"],
        r=official["r"],
        max_length=official["max_length"],
        scale=official.get("lora_alpha", 8) / official["r"] ** 0.5,
        insert_after_first=False,
        inference_mode=True,
    )
    weights = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    if missing := [key for key in _KEYS if key not in weights]:
        raise ValueError(
            f"load_official: adapter_model.bin must have {list(_KEYS)}, {missing} are missing among {list(weights)}"
        )
    width = weights["prompt_embeddings"].shape[-1]
    shapes = ((config.num_virtual_tokens, width), (config.max_length, config.r), (config.r, width))
    for key, shape in zip(_KEYS, shapes):
        if tuple(weights[key].shape) != shape:
            raise ValueError(
                f"load_official: {key} must be {shape}, as in adapter_config.json, got {tuple(weights[key].shape)}"
            )
    return config, {name: weights[key].float().contiguous() for key, name in _KEYS.items()}


def convert_official(src: str | Path, dst: str | Path) -> None:
    """Convert the authors' checkpoint in ``src`` to an adapter in ``dst``, for ``PeftModel.from_pretrained``."""
    config, state = load_official(src)
    config.save_pretrained(str(dst))
    save_file(state, Path(dst) / "adapter_model.safetensors", metadata={"format": "pt"})
