"""``DePTConfig``, and its place among PEFT's methods."""

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from ..hf.peft_method import peft_type

POSITIONS = ("padded", "token")
DEPT = peft_type("DEPT")


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

    def __post_init__(self) -> None:
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
