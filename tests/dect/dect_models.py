"""Tiny random models of every family with tokenizers trained here, and DecT's query with stock transformers: the
truth.
"""

from functools import cache

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_kernels.dect import DecoderTuning, DecTForSequenceClassification, extract

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEMPLATE = "{text} It was {mask}."
WORDS = [["great", "good"], ["terrible"]]
TEXTS = [
    "a fine film",
    "bad",
    "the plot is thin and the actors are terrible but the film is not bad",
    "great fun",
    "",
    "it was a good day for a film",
]
LABELS = [0, 1, 1, 0, 0, 1]  # of TEXTS
_CORPUS = [
    *TEXTS,
    "It was great .",
    "It was terrible.",
    "It was good (great).",
    "(good)",
    "all in all unbelievable",
] * 3
_BERT_SPECIAL, _ROBERTA_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["<s>", "<pad>", "</s>", "<unk>"]


@cache
def tokenizer(kind: str):
    """Train a tokenizer. word: like BERT's; bpe: like RoBERTa's; gpt: bpe without special tokens; unigram: like
    T5's.
    """
    if kind == "word":
        t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        t.train_from_iterator(
            _CORPUS, trainers.WordPieceTrainer(vocab_size=160, special_tokens=_BERT_SPECIAL, show_progress=False)
        )
        t.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        names = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        }
    elif kind == "unigram":
        special = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
        words, letters = (
            {w for text in _CORPUS for w in text.replace("(", " ").split()},
            set("".join(_CORPUS)) - {" "},
        )
        pieces = (
            [(w, 0.0) for w in special]
            + [(f"▁{w}", -5.0) for w in sorted(words)]
            + [(x, -9.0) for x in ["▁", *sorted(letters)]]
        )
        t = Tokenizer(models.Unigram(pieces, unk_id=2))
        t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        t.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        names = {
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "additional_special_tokens": ["<extra_id_0>"],
        }
    else:
        t = Tokenizer(models.BPE())
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = _ROBERTA_SPECIAL if kind == "bpe" else ["<|endoftext|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        t.train_from_iterator(
            _CORPUS,
            trainers.BpeTrainer(
                vocab_size=400, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
            ),
        )
        names = {"eos_token": "<|endoftext|>"}
        if kind == "bpe":
            t.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
            mask = AddedToken("<mask>", lstrip=True, special=True)
            names = {
                "cls_token": "<s>",
                "pad_token": "<pad>",
                "sep_token": "</s>",
                "unk_token": "<unk>",
                "mask_token": mask,
            }
    return PreTrainedTokenizerFast(tokenizer_object=t, model_max_length=40, **names)


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_DEBERTA = dict(
    _SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, position_buckets=4
)
_DISTILBERT = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_MODERNBERT = dict(_SMALL, local_attention=8, global_attn_every_n_layers=2, decoder_bias=True)
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
_T5["relative_attention_max_distance"] = 100  # with 128, rounding decides the bucket of distance 16
_GEMMA2 = dict(_SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0)

# name -> (prefix of its classes, their suffix, settings, tokenizer)
MASKED = {
    "bert": ("Bert", "ForMaskedLM", _SMALL, "word"),
    "roberta": ("Roberta", "ForMaskedLM", _SMALL, "bpe"),
    "xlm-roberta": ("XLMRoberta", "ForMaskedLM", _SMALL, "bpe"),
    "camembert": ("Camembert", "ForMaskedLM", _SMALL, "bpe"),
    "deberta-v2": ("DebertaV2", "ForMaskedLM", _DEBERTA, "word"),
    "deberta-v2-new-head": ("DebertaV2", "ForMaskedLM", dict(_DEBERTA, legacy=False), "word"),
    "electra": ("Electra", "ForMaskedLM", dict(_SMALL, embedding_size=16), "word"),
    "albert": ("Albert", "ForMaskedLM", dict(_SMALL, embedding_size=16), "word"),
    "distilbert": ("DistilBert", "ForMaskedLM", _DISTILBERT, "word"),
    "modernbert": ("ModernBert", "ForMaskedLM", _MODERNBERT, "word"),
    "mpnet": ("MPNet", "ForMaskedLM", _SMALL, "bpe"),
}
OTHERS = {
    "gpt2": ("GPT2", "LMHeadModel", _GPT2, "gpt"),
    "llama": ("Llama", "ForCausalLM", _SMALL, "gpt"),
    "gemma2": ("Gemma2", "ForCausalLM", _GEMMA2, "gpt"),  # its logits pass through a tanh
    "t5": ("T5", "ForConditionalGeneration", _T5, "unigram"),
    "t5-tied": ("T5", "ForConditionalGeneration", dict(_T5, tie_word_embeddings=True), "unigram"),
}
MODELS = MASKED | OTHERS
TEMPLATES = {"gpt": "{text} It was {mask}"}


def make(name: str, kind: str | None = None, **settings):
    """A model in eval mode with random weights and biases, its tokenizer and a template."""
    prefix, suffix, defaults, which = MODELS[name]
    t = tokenizer(which)
    torch.manual_seed(0)
    pad = 0 if t.pad_token_id is None else t.pad_token_id
    config = getattr(transformers, f"{prefix}Config")(vocab_size=len(t), pad_token_id=pad, **defaults | settings)
    model = getattr(transformers, prefix + (kind or suffix))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model, t, TEMPLATES.get(which, TEMPLATE)


@torch.no_grad()
def by_hand(model, t, texts, template, word_ids, dtype=None):
    """Hidden states and the label words' largest logits, from full logits, one text at a time."""
    features, scores = [], []
    for text in texts:
        filled = template.replace("{text}", text)
        causal, seq2seq = t.mask_token is None and "<extra_id_0>" not in t.get_vocab(), "<extra_id_0>" in t.get_vocab()
        filled = filled.replace("{mask}", "<extra_id_0>" if seq2seq else "" if causal else t.mask_token)
        ids = torch.tensor([t(filled.rstrip() if causal else filled)["input_ids"]])
        extra = {"decoder_input_ids": torch.tensor([[0, t.convert_tokens_to_ids("<extra_id_0>")]])} if seq2seq else {}
        output = model(input_ids=ids, output_hidden_states=True, **extra)
        at = -1 if causal or seq2seq else int((ids[0] == t.mask_token_id).nonzero())
        features.append((output.decoder_hidden_states if seq2seq else output.hidden_states)[-1][0, at])
        scores.append(torch.stack([output.logits[0, at, ids].max() for ids in word_ids]))
    return torch.stack(features), torch.stack(scores)


def trained(name, words=WORDS, **options):
    model, t, template = make(name)
    extraction = extract(model, t, TEXTS, template, words)
    classifier = DecoderTuning(dim=8, empty_scores=extraction.empty_scores, classes=["bad", "good"], **options)
    classifier.fit(extraction.features, [classifier.classes[i] for i in LABELS], extraction.scores)
    q = classifier.logits(extraction.features, extraction.scores)
    return DecTForSequenceClassification.from_classifier(classifier, model, t, template, words), t, q


@torch.no_grad()
def logits_of(model, t):
    rows = [t(text, return_tensors="pt")["input_ids"] for text in model.prepare(TEXTS, t)]
    return torch.cat([model(input_ids=ids).logits for ids in rows])


def plain_loop(classifier, features, labels, scores, dtype=torch.float64):
    """The same initialisation, trained by autograd and torch.optim.Adam."""
    start = DecoderTuning(**classifier.get_params() | {"epochs": 0}).fit(features, labels, scores).head_
    weight, radius = (x.to(dtype).requires_grad_() for x in (start.projection, start.radius))
    optimizer = torch.optim.Adam([weight, radius], lr=classifier.lr)
    losses = []
    for _ in range(classifier.epochs):
        z = torch.nn.functional.normalize(features.to(dtype) @ weight.T, dim=1)
        q = -(z[:, None] - start.prototypes.to(dtype)).norm(dim=2) + radius
        if scores is not None:
            q = q + classifier.score_weight_ * scores.to(dtype)
        loss = torch.nn.functional.cross_entropy(q, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return weight.detach(), radius.detach(), torch.stack(losses)


def stopped_after(model, batches, error):
    """Raise ``error`` before the forward that follows ``batches`` others.

    The empty text and the trial of the columns count as batches.
    """
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) > batches:
            error()

    return model.base_model.register_forward_pre_hook(count), calls
