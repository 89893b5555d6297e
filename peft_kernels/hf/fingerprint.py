"""A digest of everything that the features of a frozen model depend on, and of nothing else."""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

# children of a base model whose output no feature depends on; random if the checkpoint lacks them
UNREAD = ("pooler", "contact_head")
# settings about files, unused heads and the output format
IGNORED_SETTINGS = {
    "_name_or_path", "architectures", "base_model_name_or_path", "dtype", "id2label", "inference_mode", "label2id",
    "num_labels", "output_attentions",
    "output_hidden_states", "peft_version", "problem_type", "return_dict", "revision", "task_specific_params",
    "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
WORKERS = 4


def fingerprint(model: nn.Module, base: nn.Module, inputs) -> str:
    """The cache key of the features that ``base`` computes when ``model``, which contains it, reads ``inputs``.

    It covers every element of every weight and buffer, the configuration, the active adapters and whether they are
    merged, autocast, and ``inputs``, which must be JSON-serializable. It leaves out versions, paths, inactive adapters,
    and a pooler, on which no feature depends.

    Raises:
        ValueError: a weight has no values (it is on ``meta``, and no hook says where it is offloaded).
    """
    unread = {id(child) for name in UNREAD if (child := getattr(base, name, None)) is not None}
    device = next((x.device.type for x in model.parameters() if not x.is_meta), "cpu")
    settings = [type(model).__name__, _plain(model.config.to_dict()), _autocast(device), inputs]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with ThreadPoolExecutor(WORKERS) as pool:  # hashlib releases the GIL
        for part in pool.map(_digest_of, _parts(model, "", unread, set())):
            digest.update(part)
    return digest.hexdigest()


def digest_of(tensors: dict[str, Tensor]) -> str:
    """A digest of names, shapes, dtypes and every element."""
    return hashlib.sha256(b"".join(_digest_of((name, x)) for name, x in sorted(tensors.items()))).hexdigest()


def _digest_of(part: tuple[str, Tensor | str | Callable[[], Tensor]]) -> bytes:
    name, x = part
    x = x() if callable(x) and not isinstance(x, Tensor) else x
    # SHA-1 is the fastest of hashlib on a CPU with SHA instructions; collision attacks do not matter here
    if isinstance(x, str):
        return hashlib.sha1(f"{name} {x}".encode(), usedforsecurity=False).digest()
    if hasattr(x, "__tensor_flatten__"):  # quantised weights, shards
        inner, context = x.__tensor_flatten__()
        return b"".join(_digest_of((f"{name}.{attribute}", getattr(x, attribute))) for attribute in inner)
    digest = hashlib.sha1(f"{name} {x.dtype} {tuple(x.shape)}".encode(), usedforsecurity=False)
    digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _parts(
    module: nn.Module, prefix: str, skipped: set[int], seen: set[int]
) -> Iterator[tuple[str, str | Callable[[], Tensor]]]:
    """Pairs of names and tensors, each tensor once, and pairs of adapted modules' names and their adapters' state."""
    if id(module) in skipped:
        return
    inactive = set()
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        state, inactive = _adapters_of(module)
        yield prefix, json.dumps(state, sort_keys=True)
    for name, x in (*module._parameters.items(), *module._buffers.items()):
        if x is not None and id(x) not in seen:
            seen.add(id(x))
            path = f"{prefix}{name}"
            yield path, partial(_values, module, path, name, x)  # an offloaded weight is read when it is hashed
    for name, child in module._modules.items():
        if child is None or id(child) in seen:
            continue
        if inactive and isinstance(child, nn.ModuleDict | nn.ParameterDict):
            for key, x in child.items():
                if key in inactive:
                    skipped = skipped | {id(x)}
                    seen.add(id(x))  # a ParameterDict holds tensors
        seen.add(id(child))
        yield from _parts(child, f"{prefix}{name}.", skipped, seen)


def _adapters_of(layer) -> tuple[dict, set[str]]:
    """The state of a layer's active adapters besides their weights, and the names of its inactive ones."""
    merged = list(getattr(layer, "merged_adapters", []))
    disabled = bool(layer.disable_adapters)
    active = [*merged, *(name for name in ([] if disabled else layer.active_adapters) if name not in merged)]
    parameters = [child for child in layer._modules.values() if isinstance(child, nn.ModuleDict | nn.ParameterDict)]
    names = {name for child in parameters for name in dict(child)}
    if not active:
        return {}, names
    settings = {
        f"{field}.{name}": _plain(values[name])
        for field, values in vars(layer).items()
        if isinstance(values, dict) and not field.startswith("_")
        for name in active
        if name in values
    }
    return {"live": active, "merged": merged, "disabled": disabled, "settings": settings}, names - set(active)


def _values(module: nn.Module, path: str, name: str, x: Tensor) -> Tensor:
    """The values of ``x``, which accelerate's hook stores if the weight is offloaded."""
    if not x.is_meta:
        return x
    outer = getattr(module, "_hf_hook", None)
    for hook in getattr(outer, "hooks", (outer,)):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    raise ValueError(f"cache: every weight must have values to identify the model, but {path} lies on meta")


def _autocast(device: str) -> str | None:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _plain(x):
    """``x`` in a form that json writes, identical in every process."""
    if isinstance(x, PeftConfig):
        x = x.to_dict()
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items() if k not in IGNORED_SETTINGS}
    if isinstance(x, set | frozenset):
        return sorted(map(str, x))
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    if isinstance(x, Enum):
        return _plain(x.value)
    if isinstance(x, torch.dtype):
        return str(x)
    return x if isinstance(x, str | int | float | bool | None) else type(x).__name__
