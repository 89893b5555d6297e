"""The public API under a type checker: ``make lint`` checks this file strictly; it is never run."""

from pathlib import Path

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import assert_type

from peft_kernels import DePTConfig, PASTAConfig, dect, dept, ops, pasta, pid, ytuning


def operators(x: Tensor, ids: Tensor) -> None:
    assert_type(ops.shared_cross_attention(x, x, x), Tensor | tuple[Tensor, Tensor])
    assert_type(ops.add_layer_norm_inject(x, x, x, x), Tensor)
    assert_type(ops.add_inject_layer_norm(x, x, x, x), tuple[Tensor, Tensor])
    assert_type(ops.decomposed_prompt_embedding(ids, x, x, None, None), Tensor)
    assert_type(ops.special_token_slots(ids, ids, max_slots=2), Tensor)
    assert_type(ops.special_token_add(x, x, ids), Tensor)
    assert_type(ops.special_token_add_(x, x, ids), Tensor)
    assert_type(ops.label_logits(x, x, ids, positions=ids, reduce="mean"), Tensor)
    assert_type(ops.prototype_scores(x, x, x, x), Tensor)
    assert_type(ops.label_cross_attention(x, x, x, x, x, num_heads=2), Tensor)


def methods(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, backbone: PreTrainedModel, x: Tensor, ids: Tensor
) -> None:
    assert_type(pid.enable(model, pack_weights=False), nn.Module)
    assert_type(pid.is_enabled(model), bool)
    answer = pid.generate(model, ids, [[1, 2], [3]], max_new_tokens=4)
    assert_type(answer.sequences, list[list])
    assert_type(pid.disable(model), nn.Module)

    assert_type(dept.param_groups(model, lr_head=1e-3), list[dict])
    assert_type(dept.load_official("folder"), tuple[dept.DePTConfig, dict[str, Tensor]])
    assert_type(dept.DePTConfig(num_virtual_tokens=4, r=2, max_length=8).r, int)
    assert_type(DePTConfig(), dept.DePTConfig)

    assert_type(pasta.PASTAConfig(special_token_ids=[0, 2]).init, str)
    assert_type(PASTAConfig(), pasta.PASTAConfig)
    pasta.fuse(model)
    pasta.unfuse(model)

    found = dect.extract(model, tokenizer, ["a", "b"], "{text} {mask}", ["good", ["bad", "poor"]], cache=Path("cache"))
    assert_type(found.scores, Tensor | None)
    classifier = dect.DecoderTuning(empty_scores=found.empty_scores).fit(found.features, [0, 1], found.scores)
    assert_type(classifier, dect.DecoderTuning)
    assert_type(classifier.logits(found.features), Tensor)
    assert_type(classifier.score(np.zeros((2, 3)), np.zeros(2)), float)
    wrapped = dect.DecTForSequenceClassification.from_classifier(classifier, backbone, tokenizer, "{text} {mask}", None)
    assert_type(wrapped.prepare(["a"], tokenizer), list[str])

    folder = ytuning.cache_features(model, tokenizer, ["a", "b"], "folder")
    assert_type(folder, Path)
    data = ytuning.CachedFeatures(folder, [0, 1], verify=True)
    assert_type(data.lengths, list[int])
    assert_type(ytuning.FeatureCollator()([data[0]]), dict)
    assert_type(ytuning.YTuningConfig(num_blocks=2).num_blocks, int)
