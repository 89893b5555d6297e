"""Every text class of transformers' auto mappings at a tiny size: widths of 32, two layers, a hundred tokens."""

import dataclasses
import inspect
import re

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

transformers.logging.set_verbosity_error()

MAPPINGS = (
    "MODEL_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MASKED_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
)
VOCAB, PAD, BOS, EOS, MASK, WIDTH = 120, 0, 1, 2, 3, 32

# name of a setting in any family -> its tiny value; the first match counts
_SIZES = [
    (r"vocab_size", VOCAB),
    (r"head_dim$|^d_kv$|_head_size$|^kv_channels$|^d_head$|^dim_head$|^rotary_dim$|_rank$", 8),
    (r"key_value_heads$|kv_heads$", 2),
    (r"heads$|^n_head$", 4),
    (r"layers$|^n_layer$|depth$", 2),
    (r"shared_experts$", 1),
    (r"num_experts$|routed_experts$|local_experts$", 4),
    (r"experts_per_tok(en)?$|^moe_k$|top_?k$", 2),
    (r"^n_group$|^topk_group$|^num_hidden_groups$|^num_groups$|^n_groups$", 1),
    (
        r"intermediate_size\w*$|ffn_dim$|^d_ff$|^d_inner$|^ffn_hidden_size$|^hidden_dim$|ff_dim$|^n_inner$|_ff$|^ffn_size$",
        48,
    ),
    (
        r"hidden_size\w*$|d_model$|^n_embd$|embed_dim$|^dim$|^emb_dim$|^embedding_size$|projection_dim$|width$|^d_embed$|^d_proj$|^hidden_channels$",
        WIDTH,
    ),
    (
        r"max_position_embeddings$|^n_positions$|^max_seq_len$|^n_ctx$|max_\w+_position_embeddings$|^max_position$|^seq_len\w*$",
        64,
    ),
    (r"^image_size$", 16),
    (r"bottleneck_size$|^true_hidden_size$", 16),
    (r"^(spatial_)?patch_size$", 8),
    (r"sliding_window$|^attention_window$|^local_attention$|^window_size$|chunk_size$", 8),
]

# the adapter must add after the scale
_SWITCHES = {
    "embedding_multiplier": 3.0,
    "scale_embedding": True,
    "mup_enabled": True,
}
_IMAGE_VOCABULARY = {"<image>": 110, "<|extra_200|>": 111, "<|image start|>": 112}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
# by configuration class: settings that no rule covers
OVERRIDES = {
    "Apertus1p5Config": {
        "image_token_id": 50,
        "audio_token_id": 51,
        "image_token_offset": 60,
        "audio_token_offset": 70,
    },
    "Apertus1p5VisionTokenizerConfig": {"codebook_size": 10},
    "BambaConfig": {"attn_layer_indices": [1]},
    "ChameleonConfig": {"vocabulary_map": _IMAGE_VOCABULARY},
    "CohereCompassTextConfig": {"layer_types": ["sliding_attention", "full_attention"]},
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DoryConfig": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "Dots1Config": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "Emu3Config": {"vocabulary_map": _IMAGE_VOCABULARY},
    "EsmConfig": {"mask_token_id": MASK},
    "EsmcConfig": {"num_key_value_heads": 4},
    "FSMTConfig": {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Glm5NextTextConfig": {"num_key_value_heads": 4},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "LayoutLMv3Config": {"coordinate_size": 4, "shape_size": 8},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LiltConfig": {"hidden_size": 48},
    "LongcatFlashConfig": {"qk_head_dim": 16},
    "Mamba2Config": {"num_heads": 8},
    "NemotronConfig": {"num_key_value_heads": 2},
    **{
        name: {"rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
        for name in ("Glm4vTextConfig", "Glm4vMoeTextConfig", "GlmImageTextConfig", "GlmOcrTextConfig")
    },
    **{
        name: {"rope_parameters": _SECTIONS}
        for name in ("PaddleOCRTextConfig", "Qwen2VLTextConfig", "Qwen2_5OmniTextConfig", "Qwen2_5_VLTextConfig")
    },
    # stock reads this setting, and only the whole model's configuration has it
    **{name: {"vision_start_token_id": 113} for name in ("Qwen2_5OmniThinkerConfig", "Qwen3OmniMoeThinkerConfig")},
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 3,
    },
    "Step3p7TextConfig": {"sliding_window": 8},
    "WavTokenizerEncoderConfig": {"codebook_dim": WIDTH, "codebook_size": 10},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "xLSTMConfig": {"hidden_size": 128},
}


def classes() -> dict[str, tuple[type, type]]:
    """Class name -> (model class, configuration class), for classes whose main input is tokens."""
    found = {}
    for name in MAPPINGS:
        mapping = getattr(modeling_auto, name, {})
        for config in mapping:
            try:
                value = mapping[config]
            except ValueError:  # named, but missing
                continue
            for kind in value if isinstance(value, (tuple, list)) else [value]:
                if kind is not None and _reads_tokens(kind):
                    found.setdefault(kind.__name__, (kind, getattr(kind, "config_class", None) or config))
    return dict(sorted(found.items()))


def _reads_tokens(kind):
    try:
        return kind.main_input_name == "input_ids" and "input_ids" in inspect.signature(kind.forward).parameters
    except ImportError:  # from a library that is not installed
        return False


def tiny_settings(config) -> dict:
    """Settings for a tiny configuration; ``config`` has its class's defaults."""
    settings, defaults = {}, _defaults(config)
    for name, value in defaults.items():
        if isinstance(value, transformers.PreTrainedConfig):
            settings[name] = {
                "model_type": value.model_type,
                **tiny_settings(value),
                **OVERRIDES.get(type(value).__name__, {}),
            }
        elif name in _SWITCHES:
            settings[name] = _SWITCHES[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _SIZES if re.search(pattern, name)), None)
            if size is not None and value > 0:
                # in a sub-configuration, also non-default settings
                settings[name] = size if size == VOCAB else min(value, size)
            elif name.endswith(("_token_id", "_token_index")) and value >= VOCAB:
                settings[name] = 100 + value % 20
        elif value is None and name in ("vocab_size", "head_dim"):
            settings[name] = VOCAB if name == "vocab_size" else 8
    settings |= {
        name: i for name, i in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)) if name in defaults
    }
    if getattr(config, "is_encoder_decoder", False) and "decoder_start_token_id" not in defaults:
        settings["decoder_start_token_id"] = PAD
    if "kv_lora_rank" in defaults:  # latent attention has as many keys as queries
        settings["num_key_value_heads"] = 4
    for name in ("layer_types", "layers_block_type"):
        if isinstance(types := defaults.get(name), list):
            settings[name] = (list(dict.fromkeys(types)) * 2)[: max(2, len(set(types)))]
            settings |= {
                n: len(settings[name]) for n in ("num_hidden_layers", "n_layer", "num_layers") if n in settings
            }
    if (
        isinstance(rope := defaults.get("rope_parameters", defaults.get("rope_scaling")), dict)
        and "mrope_section" in rope
    ):
        settings["rope_parameters"] = rope | {"mrope_section": [2, 1, 1]}
    return settings


def _defaults(config) -> dict:
    """The constructor arguments of ``config``'s class, with their values in ``config``."""
    names = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else list(config.to_dict())
    defaults = {}
    for name in names:
        try:
            defaults[name] = getattr(config, name)
        except (AttributeError, RuntimeError):  # differs from layer to layer
            defaults[name] = next((f.default for f in dataclasses.fields(config) if f.name == name), None)
    return defaults


def build(kind: type, config: type, **settings) -> nn.Module:
    settings = tiny_settings(config()) | OVERRIDES.get(config.__name__, {}) | settings
    if kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) and hasattr(config, "is_decoder"):
        settings["is_decoder"] = True
    torch.manual_seed(0)
    model = kind(config(**settings)).eval()
    # as large as trained ones, padding included, and with open gates, so that no zero hides an error
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=0.2)
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.2)
    return model
