"""Names that differ between the supported versions of transformers. No other module looks at a version."""

from dataclasses import fields
from functools import partial

import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

TESTED = ((5, 17), (5, 24))  # the oldest and the newest release; pyproject.toml bounds the same range

# the name of the key/value cache in a forward's arguments and output: "past_key_values" until 5.23, "cache" since
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# until 5.23 a compiled step that gets no mask builds one inside, and breaks its graph
BUILDS_MASKS_IN_STEPS = CACHE != "cache"


def cache_of(kwargs: dict):
    """The key/value cache among the keyword arguments of a forward or of ``generate``; None if there is none.

    Every version accepts the older name from its callers.
    """
    cache = kwargs.get(CACHE)
    return kwargs.get("past_key_values") if cache is None else cache


def has_row_adapters(model: nn.Module) -> bool:
    """Whether PEFT is running ``model`` with ``adapter_names=``: each layer then expects one row per name.

    PEFT binds the names to forward pre-hooks on its layers for the duration of the call.
    """
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, partial) and "adapter_names" in hook.keywords for hook in hooks)


def check_version(caller: str) -> None:
    """Check that transformers is within the tested range.

    Raises:
        ImportError: it is not; the message names the range, the installed version and the fix.
    """
    oldest, newest = TESTED
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not oldest <= version <= newest:
        supported = f"{'.'.join(map(str, oldest))} to {'.'.join(map(str, newest))}"
        raise ImportError(
            f"{caller} uses internals of transformers and is tested with {supported}, but {transformers.__version__} is"
            f" installed: pip install 'transformers>={'.'.join(map(str, oldest))},<{newest[0]}.{newest[1] + 1}'"
        )
