"""The names that users write: imports, signatures, commands and their options.

Users notice a change here: CHANGELOG.md names it.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import typer

import peft_kernels
from peft_kernels.cli.commands import app

DOCS = Path(__file__).parents[1] / "docs"

NAMES = {
    "ops": sorted(re.findall(r"^::: peft_kernels\.ops\.\w+\.(\w+)$", (DOCS / "api/ops.md").read_text(), re.M)),
    "pid": ["PiDOutput", "disable", "enable", "forward", "generate", "is_enabled", "warmup"],
    "dept": ["DePTConfig", "DePTModel", "convert_official", "load_official", "param_groups"],
    "pasta": ["PASTAConfig", "PASTAModel", "fuse", "unfuse"],
    "dect": ["DecTConfig", "DecTForSequenceClassification", "DecoderTuning", "Extraction", "extract"],
    "ytuning": [
        "CachedFeatures",
        "FeatureCollator",
        "YTuningConfig",
        "YTuningForSequenceClassification",
        "cache_features",
    ],
}
PUBLIC = [(module, name) for module, names in NAMES.items() for name in names]

# * keyword-only, ** any keyword
PARAMETERS = {
    "ops.add_inject_layer_norm": "x residual weight bias vectors slots *eps *rms *dropout_p *seed *adapter_ids *impl",
    "ops.add_layer_norm_inject": "x residual weight bias vectors slots *eps *rms *dropout_p *seed *adapter_ids *impl",
    "ops.decomposed_prompt_embedding": "input_ids weight prompt a b *delta *scale *embed_scale *offsets"
    " *insert_after_first *adapter_ids *impl",
    "ops.label_cross_attention": "slots features w_q w_k w_v *lengths *offsets *num_heads *impl",
    "ops.label_logits": "hidden weight label_ids *bias *positions *reduce *impl",
    "ops.prototype_cross_entropy": "features projection prototypes radius scores labels *weight *impl",
    "ops.prototype_objective": "prototypes scores labels *weight *impl",
    "ops.prototype_scores": "features projection prototypes radius scores *weight *impl",
    "ops.shared_cross_attention": "query key value *key_lengths *encoder_index *cu_streams *scale *return_lse *impl",
    "ops.special_token_add": "hidden vectors slots *dropout_p *seed *adapter_ids *impl",
    "ops.special_token_add_": "hidden vectors slots *dropout_p *seed *adapter_ids *impl",
    "ops.special_token_slots": "input_ids special_ids *max_slots *attention_mask *impl",
    "pid.enable": "model *pack_weights *drop_finished",
    "pid.disable": "model",
    "pid.is_enabled": "model",
    "pid.generate": "model input_ids prompts *attention_mask **generate_kwargs",
    "pid.warmup": "model *inputs *new_tokens *prompts *prompt_tokens **generate_kwargs",
    "pid.forward": "model input_ids prompts targets *attention_mask **kwargs",
    "dept.param_groups": "model lr_prompt lr_low_rank weight_decay lr_head",
    "dept.load_official": "folder",
    "dept.convert_official": "src dst",
    "pasta.fuse": "model",
    "pasta.unfuse": "model",
    "dect.extract": "model tokenizer texts template label_words *batch_size *max_length *cache",
    "dect.DecoderTuning": "*dim *lr *epochs *score_weight *calibration *empty_scores *classes *class_weight *seed",
    "dect.DecoderTuning.fit": "features y scores sample_weight",
    "dect.DecTConfig": "backbone_config backbone_class template label_ids mask_id last_mask decoder_ids dim"
    " calibration score_weight **kwargs",
    "dect.DecTForSequenceClassification.from_classifier": "classifier backbone tokenizer template label_words",
    "dect.DecTForSequenceClassification.prepare": "texts tokenizer",
    "ytuning.cache_features": "model tokenizer texts folder *batch_size *dtype *layer *max_length *overwrite",
    "ytuning.CachedFeatures": "folder labels *verify",
    "ytuning.YTuningForSequenceClassification.forward": "features lengths attention_mask input_ids token_type_ids"
    " labels return_dict",
    "ytuning.YTuningForSequenceClassification.set_backbone": "model",
}

# their own fields, besides those of PEFT's and transformers' configurations
FIELDS = {
    "dept.DePTConfig": (
        "num_virtual_tokens r max_length scale position insert_after_first init_text tokenizer_name_or_path"
        " init_token_ids modules_to_save"
    ),
    "pasta.PASTAConfig": "num_special_tokens special_token_ids tokenizer_name_or_path dropout init overflow"
    " modules_to_save",
    "ytuning.YTuningConfig": (
        "hidden_size num_blocks num_attention_heads intermediate_size hidden_dropout_prob "
        "loss margin backbone backbone_layer initializer_range layer_norm_eps"
    ),
    "pid.PiDOutput": "sequences scores output",
    "dect.Extraction": "features scores empty_scores",
}

# command -> [arguments] and options
OPTIONS = {
    "": "--version --install-completion --show-completion",
    "info": "",
    "demo": "--model --input --prompts --data --tokenizer --dtype --device --new-tokens --input-tokens --limit"
    " --batch-size --repeats --out",
    "bench": "[operators] --device --dtype --shapes --phase --repeats --quick --against --out",
    "tune": "[operators] --dtype --out --quick",
    "profile": "[model] --method --batch --streams --length --new-tokens --dtype --device --repeats --train --quick"
    " --out",
    "report": "[folders] --out --figures --picture",
}


def of(path: str):
    module, *names = path.split(".")
    value = import_module(f"peft_kernels.{module}")
    for name in names:
        value = getattr(value, name)
    return value


def own_functions(value) -> list:
    """The function itself; for a class, its public methods and ``__init__``."""
    if inspect.isfunction(value):
        return [value]
    members = [(name, getattr(member, "__func__", member)) for name, member in vars(value).items()]
    members = [(name, member.fget if isinstance(member, property) else member) for name, member in members]
    return [
        f
        for name, f in members
        if inspect.isfunction(f) and f.__module__ == value.__module__ and (name == "__init__" or name[0] != "_")
    ]


def test_the_package():
    assert peft_kernels.__all__ == ["DePTConfig", "PASTAConfig", "__version__", "ops"]
    assert peft_kernels.DePTConfig is of("dept.DePTConfig") and peft_kernels.PASTAConfig is of("pasta.PASTAConfig")


@pytest.mark.parametrize("module", NAMES)
def test_names(module):
    assert sorted(of(module).__all__) == NAMES[module]
    assert all(hasattr(of(module), name) for name in NAMES[module])


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters(path):
    marks = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = [p for p in inspect.signature(of(path)).parameters.values() if p.name != "self"]
    assert [marks.get(p.kind, "") + p.name for p in parameters] == PARAMETERS[path].split()


@pytest.mark.parametrize("path", FIELDS)
def test_fields(path):
    assert [*inspect.get_annotations(of(path))] == FIELDS[path].split()


def test_every_function_is_among_them():
    """Of operators, docs/api/ops.md is the list: a new one needs no line here."""
    others = [(module, name) for module, name in PUBLIC if module != "ops"]
    assert {f"{module}.{name}" for module, name in others if inspect.isfunction(of(f"{module}.{name}"))} <= set(
        PARAMETERS
    )


def test_commands_and_their_options():
    def names(command):
        return " ".join("/".join(p.opts) if p.param_type_name == "option" else f"[{p.name}]" for p in command.params)

    command = typer.main.get_command(app)
    assert {"": names(command), **{name: names(sub) for name, sub in command.commands.items()}} == OPTIONS


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_annotated_and_described(module, name):
    value = of(f"{module}.{name}")
    assert vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    for function in own_functions(value):
        signature = inspect.signature(function)
        bare = [
            p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")
        ]
        assert not bare, function.__qualname__
        assert signature.return_annotation is not signature.empty, function.__qualname__


@pytest.mark.parametrize("module", NAMES)
def test_the_reference_has_every_name(module):
    """An operator is listed under its package, which may have the same name: mkdocs reads the sources, and finds the
    package first.
    """
    page = (DOCS / "api" / f"{module}.md").read_text(encoding="utf-8")
    paths = re.findall(rf"^::: peft_kernels\.({module}\.[\w.]+)$", page, re.MULTILINE)
    assert sorted(path.split(".")[-1] for path in paths) == NAMES[module]
    for path in paths:
        package, _, name = path.rpartition(".")
        assert getattr(import_module(f"peft_kernels.{package}"), name) is of(f"{module}.{name}")
