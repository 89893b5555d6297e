"""Every text class of transformers under both PEFT methods: equal to stock, or refused in a sentence. ``make
test-families`` runs this.

A class in none of the tables below must be built, accept text alone, and be equal.
"""

import re

import pytest
import torch
from checks import Refused, Unusable, adapt, dept_by_formula, dept_that_changes_nothing, is_causal, pasta
from tiny import build, classes

from peft_kernels import DePTConfig

CLASSES = classes()

# reasons why DePT refuses -> configuration classes
REFUSED_BY_DEPT = {
    "inputs_embeds, which .* does not take": "CLIPText|CpmAnt|Esmc",
    "must embed its tokens by a table": "Canine|FastSpeech2Conformer|FastSpeech2ConformerWithHifiGan|Flava|Vits",
    "must be an nn.Embedding, got QuantEmbedding": "IBert",
    "does more than look up and scale rows": "Inkling(2|2Loop)?(Text)?|MuseGlimmer|MuseGlimmerText|MuseSparkText",
    "reads input_ids for more than their embeddings": "DeepseekV4|FSMT|Gemma3nText|Gemma4|Gemma4Text",
    "cannot generate from inputs_embeds": "Bamba|CTRL|Exaone4_5_|FalconH1|Flaubert|Florence2|Gemma3|Gemma4Unified|"
    "HiggsAudioV2|HyperCLOVAXVisionV2|"
    "Kosmos2_5|NemotronH|OpenAIGPT|PaliGemma|RoCBert|XLM|XLNet|Zamba2",
}
# reasons why PASTA refuses, other than decoders and composites of text and other encoders -> configuration classes
REFUSED_BY_PASTA = {
    "must have one ModuleList": "Chameleon|Evolla|Flaubert|Funnel|Luke|Reformer|XLM",
    "must embed its tokens by a table": "Canine|Flava|Vits|FastSpeech2Conformer|FastSpeech2ConformerWithHifiGan",
    "must take hidden states": "HYV4VLText|SqueezeBert",
}
# decoders in transformers' mappings whose tokens also see later tokens -> configuration classes
BIDIRECTIONAL = {"prefixes": "PaliGemma", "encoders by default": "BertGeneration|CpmAnt|XLNet"}
# errors of stock models that need more than text, or cannot run on it -> configuration classes
NOT_TEXT_ALONE = {
    # images
    "pixel_values|image_embeds|visual_feats|'NoneType' object has no attribute": "Aimv2|Align|AltCLIP|Blip|CLIP|"
    "CLIPSeg|ChineseCLIP|GroupViT|Idefics|"
    "Lxmert|MetaClip2|OwlViT|Owlv2|Siglip|Siglip2|Tvp|Vilt|VisionTextDualEncoder|XCLIP",
    # boxes
    "[Bb]box": "Bros|Udop",
    # sound
    "input_features|input_values|conv1d|'NoneType' object has no attribute": "Clap|Clvp|PeAudio|VoxtralRealtime",
    # a token for each of its codebooks
    "shape .* is invalid for input of size|must match the size of tensor": "Dia|KyutaiSpeechToText|MusicgenDecoder|"
    "MusicgenMelodyDecoder",
    # the states of the model that it assists
    "inputs_embeds and shared_kv_states cannot be None": "Gemma4UnifiedAssistant",
    # nothing: it expects outputs that its text model does not return
    "'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'": "Llama4",
    # settings that its tiny configuration lacks
    "has no attribute 'num_hidden_layers'": "Blt",
    "object of type 'NoneType' has no len": "HunYuanVL|HunYuanVLText",
    "must match the size of tensor": "Zamba",
}
# errors of building a class -> configuration classes
NOT_BUILT = {
    "requires the (timm|detectron2) library": "FastVlm|Gemma3n|LayoutLMv2|PeAudioVideo|PeVideo|PerceptionLM",
    # part sizes that depend on each other
    "validate_architecture|must be divisible|must be greater than 0|not a multiple": "BridgeTower|Csm|FunAsrNano|"
    "Glm5Next|Glm5NextText|"
    "GradiumPhononTTS|KyutaiSpeechToText|Molmo2|MuseSpark|NemotronH_Omni_Reasoning_V3_|NeoMME|PocketTTS|VibeVoiceAsr",
    # settings without a default
    "NoneType|existing size \\(0\\)|has no attribute": "DeepseekOcr2|DiffusionGemma|Ernie4_5_VLMoe|Granite4Vision|"
    "Qwen4Exp(Text)?|T5Gemma2Encoder",
    # settings of individual layers
    "(full|sliding)_attention|per_layer_config|hidden_size_per_layer_input": "CohereCompass|CohereCompassText|"
    "Dots3Note|Gemma4Assistant",
    # a decoder among encoders of one configuration
    "make sure that `is_decoder=True`": "Reformer",
}


def test_how_many_are_built():
    """Tiny configurations, and models from them, can be made on meta for most classes."""
    failed = {}
    for name, (kind, config) in CLASSES.items():
        try:
            with torch.device("meta"):
                build(kind, config)
        except Exception as error:
            failed[name] = (config, error)
    unlisted = {name: error for name, (config, error) in failed.items() if not is_listed(NOT_BUILT, config, error)}
    assert not unlisted
    assert len(CLASSES) - len(failed) >= 0.93 * len(CLASSES) > 750


@pytest.mark.parametrize("name", CLASSES)
def test_equal_or_refused(name):
    kind, config = CLASSES[name]
    try:
        base = build(kind, config)
    except Exception as error:
        if is_listed(NOT_BUILT, config, error):
            pytest.skip(f"cannot be built tiny: {error}")
        raise
    for check in (dept_that_changes_nothing, dept_by_formula, pasta):
        try:
            check(base)
        except Unusable as error:
            assert is_listed(NOT_TEXT_ALONE, config, error), error
            if check is not pasta:
                with pytest.raises(Refused):
                    adapt(base, DePTConfig(num_virtual_tokens=0, r=2, max_length=16))
        except Refused as error:
            refused = refused_by_pasta if check is pasta else refused_by_dept
            assert refused(base, config, str(error)), error


def refused_by_dept(base, config, sentence):
    return is_listed(REFUSED_BY_DEPT, config, sentence)


def refused_by_pasta(base, config, sentence):
    if "is a decoder, whose tokens see only earlier tokens" in sentence:
        return is_causal(base) or is_of(config, BIDIRECTIONAL)
    if "has a decoder as well" in sentence:
        return base.config.is_encoder_decoder
    if "num_hidden_layers in its configuration" in sentence:
        return base.base_model.config.get_text_config() is not base.base_model.config
    return is_listed(REFUSED_BY_PASTA, config, sentence)


def is_listed(table: dict[str, str], config: type, error) -> bool:
    """Whether the table lists ``config`` under a reason that matches ``error``."""
    return any(re.search(reason, str(error)) and is_of(config, {reason: names}) for reason, names in table.items())


def is_of(config: type, table: dict[str, str]) -> bool:
    return re.fullmatch(f"({'|'.join(table.values())})Config", config.__name__) is not None
