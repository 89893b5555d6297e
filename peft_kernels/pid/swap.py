"""``enable`` and ``disable``: everything that is put onto a model, and its removal."""

from torch import nn

from ..hf.class_swap import put_on, take_off
from ..hf.names import check_version
from . import attention, packing
from .families import cross_attentions, family_of
from .generation import PiDGenerationMixin
from .hooks import DecoderHooks
from .static import StaticCaches


def enable(model: nn.Module, *, pack_weights: bool = True, drop_finished: bool | None = None) -> nn.Module:
    """Let the decoder streams of one encoder input share its cross-attention keys and values.

    Afterwards ``model.generate`` with beams, ``num_return_sequences`` or more decoder rows than encoder rows computes
    and stores the keys and values of every input once, and ``model(input_ids=(b, n), labels=(N, T))`` trains N streams
    on b encoded inputs. Streams ``[i*N/b, (i+1)*N/b)`` belong to input i, unless ``encoder_index`` (N,) names the input
    of each stream. Tokens, losses and gradients are those of repeated encoder outputs. No module is replaced, so
    adapters on the projections keep working.

    Args:
        model: an encoder-decoder model of transformers, or a PEFT model around one, with "sdpa" or "eager" attention.
            Changed in place. "sdpa" runs our operator; "eager" can return attention weights
            (``output_attentions=True``).
        pack_weights: on a CPU, generate with a second copy of the linear weights, packed for few rows. On an AMD EPYC
            with 2 cores it is 1.8 to 2.1 times as fast in float32 and 1.1 to 1.2 times in bfloat16 (``python
            benchmarks/pid_generate.py``). False: plain weights, without the copy in memory.

        drop_finished: stop computing finished streams of greedy search and sampling once at most half are unfinished.
            This reads the device in every fourth step and changes the number of rows. None: on a CPU only.

    Returns:
        ``model``. Enabling twice changes only ``pack_weights`` and ``drop_finished``.

    Raises:
        ValueError: the model's family or its attention implementation is not supported.
        ImportError: the installed version of transformers is outside the tested range.
    """
    base = _base(model)
    if is_enabled(base):
        _set(base, pack_weights, drop_finished)
        return model
    check_version("pid.enable")
    family_of(base)
    unsupported = {config._attn_implementation for config in attention.configs_of(base)} - attention.NAMES.keys()
    if unsupported:
        raise ValueError(
            f"pid.enable: attention implementations {sorted(map(str, unsupported))} are not supported:"
            " first call model.set_attn_implementation('sdpa') or 'eager'"
        )
    for module in cross_attentions(base):
        module.pid_cross_attention = True
    base.pid_hooks = DecoderHooks(base)
    _set(base, pack_weights, drop_finished)
    base.pid_static_caches = StaticCaches()
    attention.adopt(base.pid_hooks.configs)
    put_on(base, PiDGenerationMixin)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Undo ``enable`` exactly, bit for bit. Does nothing if ``model`` is not enabled."""
    base = _base(model)
    if not is_enabled(base):
        return model
    take_off(base, PiDGenerationMixin)
    for handle in base.pid_hooks.handles:
        handle.remove()
    packing.forget(base)
    attention.rename(base.pid_hooks.configs, {ours: stock for stock, ours in attention.NAMES.items()})
    del base.pid_hooks, base.pid_pack_weights, base.pid_drop_finished, base.pid_static_caches
    for module in cross_attentions(base):
        del module.pid_cross_attention
    return model


def is_enabled(model: nn.Module) -> bool:
    """Whether ``model``, or the model inside a PEFT model, is enabled."""
    return isinstance(_base(model), PiDGenerationMixin)


def _set(base, pack_weights, drop_finished):
    base.pid_pack_weights = pack_weights
    base.pid_drop_finished = drop_finished


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model
