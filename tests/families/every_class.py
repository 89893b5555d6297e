"""Every text class of transformers under both PEFT methods: as stock, or refused in a sentence. ``make test-families`` runs this.

A class that is in none of the tables below has to be built, take text alone, and be equal.
"""

import re

import pytest
import torch
from checks import Refused, Unusable, adapt, dept_by_formula, dept_that_changes_nothing, is_causal, pasta
from tiny import build, classes

from peft_kernels import DePTConfig

CLASSES = classes()

# what DePT refuses -> configuration classes
REFUSED_BY_DEPT = {
    "inputs_embeds, which .* does not take": "CLIPText|CpmAnt|Esmc",
    "must embed its tokens by a table": "Canine|FastSpeech2Conformer|FastSpeech2ConformerWithHifiGan|Flava|Vits",
    "must be an nn.Embedding, got QuantEmbedding": "IBert",
    "does more than look up and scale rows": "Inkling2|Inkling2Text|InklingText|MuseGlimmer|MuseGlimmerText|MuseSparkText",
    "reads input_ids for more than their embeddings": "DeepseekV4|FSMT|Gemma3nText|Gemma4|Gemma4Text",
    "cannot generate from inputs_embeds": "Bamba|CTRL|Exaone4_5_|FalconH1|Flaubert|Florence2|Gemma3|Gemma4Unified|HiggsAudioV2|HyperCLOVAXVisionV2|"
    "Kosmos2_5|NemotronH|OpenAIGPT|PaliGemma|RoCBert|XLM|XLNet|Zamba2",
}
# what PASTA refuses beside decoders and composites of text and other encoders -> configuration classes
REFUSED_BY_PASTA = {
    "must have one ModuleList": "Chameleon|Evolla|Flaubert|Funnel|Luke|Reformer|XLM",
    "must embed its tokens by a table": "Canine|Flava|Vits|FastSpeech2Conformer|FastSpeech2ConformerWithHifiGan",
    "must take hidden states": "SqueezeBert",
}
# decoders by transformers' mappings, whose tokens see what is behind them too -> configuration classes
BIDIRECTIONAL = {"prefixes": "PaliGemma", "encoders by default": "BertGeneration|CpmAnt|XLNet"}
# what the stock model wants beside text, or why it cannot run on it -> configuration classes
NOT_TEXT_ALONE = {
    "images": "Aimv2|Align|AltCLIP|Blip|CLIP|CLIPSeg|ChineseCLIP|GroupViT|Idefics|Lxmert|MetaClip2|OwlViT|Owlv2|Siglip|Siglip2|Tvp|Vilt|"
    "VisionTextDualEncoder|XCLIP",
    "boxes": "Bros|Udop",
    "sound, or a token for each of its codebooks": "Clap|Clvp|Dia|KyutaiSpeechToText|MusicgenDecoder|MusicgenMelodyDecoder|Nemotron3_5Transcribe|"
    "PeAudio|VoxtralRealtime",
    "labels as long as text and image together": "Git",
    "three separators": "Longformer",
    "settings that its tiny form lacks": "Blt|HunYuanVL|HunYuanVLText|Qwen2_5OmniThinker|Qwen3OmniMoeThinker|Step3p7|Zamba",
}
# why a class is not built tiny -> configuration classes
NOT_BUILT = {
    "timm, detectron2 or scipy is not there": "FastVlm|Gemma3n|Inkling|LayoutLMv2|PeAudioVideo|PeVideo|PerceptionLM",
    "the sizes of its parts depend on each other": "BridgeTower|Csm|FunAsrNano|Glm5Next|Glm5NextText|GradiumPhononTTS|KyutaiSpeechToText|Molmo2|"
    "MuseSpark|NemotronH_Omni_Reasoning_V3_|NeoMME|PocketTTS|VibeVoiceAsr",
    "settings without a default": "DeepseekOcr2|DiffusionGemma|Ernie4_5_VLMoe|Granite4Vision|Qwen4Exp|Qwen4ExpText|T5Gemma2Encoder",
    "settings of single layers": "CohereCompass|CohereCompassText|Dots3Note|Gemma4Assistant|Gemma4UnifiedAssistant",
    "a decoder among encoders of one configuration": "Reformer",
}


def test_how_many_are_built():
    """On meta: whether a configuration can be made tiny, and a class of it."""
    failed = {}
    for name, (kind, config) in CLASSES.items():
        try:
            with torch.device("meta"):
                build(kind, config)
        except Exception as error:
            failed[name] = (config, error)
    unlisted = {name: error for name, (config, error) in failed.items() if not is_of(config, NOT_BUILT)}
    assert not unlisted
    assert len(CLASSES) - len(failed) >= 0.93 * len(CLASSES) > 750


@pytest.mark.parametrize("name", CLASSES)
def test_equal_or_refused(name):
    kind, config = CLASSES[name]
    try:
        base = build(kind, config)
    except Exception as error:
        if is_of(config, NOT_BUILT):
            pytest.skip(f"cannot be built tiny: {error}")
        raise
    for check in (dept_that_changes_nothing, dept_by_formula, pasta):
        try:
            check(base)
        except Unusable as error:
            assert is_of(config, NOT_TEXT_ALONE), error
            if check is not pasta:
                with pytest.raises(Refused):
                    adapt(base, DePTConfig(num_virtual_tokens=0, r=2, max_length=16))
        except Refused as error:
            refused = refused_by_pasta if check is pasta else refused_by_dept
            assert refused(base, config, str(error)), error


def refused_by_dept(base, config, sentence):
    return any(re.search(reason, sentence) and is_of(config, {reason: names}) for reason, names in REFUSED_BY_DEPT.items())


def refused_by_pasta(base, config, sentence):
    if "is a decoder, whose tokens see only what is before them" in sentence:
        return is_causal(base) or is_of(config, BIDIRECTIONAL)
    if "has a decoder as well" in sentence:
        return base.config.is_encoder_decoder
    if "num_hidden_layers in its configuration" in sentence:
        return base.base_model.config.get_text_config() is not base.base_model.config
    return any(reason in sentence and is_of(config, {reason: names}) for reason, names in REFUSED_BY_PASTA.items())


def is_of(config: type, table: dict[str, str]) -> bool:
    return re.fullmatch(f"({'|'.join(table.values())})Config", config.__name__) is not None
