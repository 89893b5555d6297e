"""``DePTConfig``, and its place among PEFT's methods."""

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES

PREFIX = "dept_"
POSITIONS = ("padded", "token")


def _peft_type(name: str) -> PeftType:
    """A member of ``PeftType``; added if PEFT has none of that name, because PEFT registers methods of its own enumeration only."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


DEPT = _peft_type("DEPT")


@dataclass
class DePTConfig(PeftConfig):
    """Decomposed prompt tuning (arXiv 2309.05173): m prompt rows P, and ``scale * A @ B`` added to the embedding of token i by its position.

    Args:
        num_virtual_tokens: m, the rows of P.
        r: rank of the update.
        max_length: s, the rows of A: the longest input, in tokens, without the prompt. Longer inputs are refused. Tokens that a causal
            model generates beyond it get their embedding alone.
        scale: factor of the update. None: 8 / sqrt(r), as in the authors' code (the paper has none).
        position: what the row of A counts where inputs are padded on the left: ``"padded"`` columns of the padded array, as the authors'
            code does, or ``"token"`` the tokens, which gives an input the same result whatever it is padded to. It needs an attention
            mask. Without padding, or with padding on the right, both are the same.
        insert_after_first: put P behind the first token, for models that read a summary from it. None: True for encoders such as
            BERT, False for encoder-decoder and causal models.
        init_text: start P from the embeddings of this text's tokens, repeated or cut to m rows. None: N(0, 1).
        tokenizer_name_or_path: the tokenizer for ``init_text``.
        init_token_ids: the tokens themselves, in place of ``init_text``; otherwise filled in from it, so that loading an adapter needs no
            tokenizer.
        modules_to_save: further modules to train and save, as in every PEFT method. PEFT adds the head of a classification model.

    Raises:
        ValueError: a value out of range, or ``init_text`` without a tokenizer.
    """

    num_virtual_tokens: int = field(default=60)
    r: int = field(default=30)
    max_length: int = field(default=256)
    scale: float | None = field(default=None)
    position: str = field(default="padded")
    insert_after_first: bool | None = field(default=None)
    init_text: str | None = field(default=None)
    tokenizer_name_or_path: str | None = field(default=None)
    init_token_ids: list[int] | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    # no field: PEFT looks for modules to replace, and these say that there are none
    target_modules = DUMMY_TARGET_MODULES

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = DEPT
        for name, least in (("num_virtual_tokens", 0), ("r", 1), ("max_length", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"DePTConfig: {name} must be an integer of at least {least}, got {value!r}")
        if self.position not in POSITIONS:
            raise ValueError(f"DePTConfig: position must be one of {POSITIONS}, got {self.position!r}")
        if self.init_text is not None and self.tokenizer_name_or_path is None and self.init_token_ids is None:
            raise ValueError(f"DePTConfig: init_text={self.init_text!r} needs tokenizer_name_or_path")
        if self.init_token_ids is not None and not self.init_token_ids:
            raise ValueError("DePTConfig: init_token_ids must name at least one token, got none")
        if self.scale is None:
            self.scale = 8 / self.r**0.5


def register(tuner: type[BaseTuner]) -> None:
    """Let ``get_peft_model`` and ``PeftModel.from_pretrained`` find the method; once per process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if DEPT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="dept", config_cls=DePTConfig, model_cls=tuner, prefix=PREFIX)
