"""``DePTConfig`` and the PEFT type ``DEPT``."""

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from ..hf.peft_method import peft_type

POSITIONS = ("padded", "token")
DEPT = peft_type("DEPT")


@dataclass
class DePTConfig(PeftConfig):
    """Decomposed prompt tuning (arXiv 2309.05173): a prompt P, and ``(scale * A @ B)[i]`` added to embedding i.

    Args:
        num_virtual_tokens: m, the number of rows of P.
        r: rank of the update.
        max_length: s, the number of rows of A: the longest input in tokens, without the prompt. Longer inputs are
            refused. Tokens that a causal model generates beyond it get their embedding without an update.
        scale: factor of the update. None: 8 / sqrt(r), as in the authors' code (the paper has none).
        position: how the row of A is chosen where inputs are padded on the left. ``"padded"`` counts columns of the
            padded array, as in the authors' code. ``"token"`` counts tokens, so that an input's result does not depend
            on its padding; it needs an attention mask. Without padding, or with padding on the right, both are the
            same.
        insert_after_first: put P behind the first token, for models that read a summary from it. None: True for
            encoders such as BERT, False for encoder-decoder and causal models.
        init_text: initialize P with the embeddings of this text's tokens, repeated or cut to m rows. None: N(0, 1).
        tokenizer_name_or_path: the tokenizer for ``init_text``.
        init_token_ids: the token ids of ``init_text``, if given instead of it; otherwise filled in from the text, so
            that loading an adapter needs no tokenizer.
        modules_to_save: further modules to train and save, as in every PEFT method. The head of a classification model
            is added.

    Raises:
        ValueError: a value is out of range, or ``init_text`` has no tokenizer.
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

    # not a field: tells PEFT that there are no modules to replace
    target_modules = DUMMY_TARGET_MODULES

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DEPT
        for name, minimum in (("num_virtual_tokens", 0), ("r", 1), ("max_length", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < minimum:
                raise ValueError(f"DePTConfig: {name} must be an integer of at least {minimum}, got {value!r}")
        if self.position not in POSITIONS:
            raise ValueError(f"DePTConfig: position must be one of {POSITIONS}, got {self.position!r}")
        if self.init_text is not None and self.tokenizer_name_or_path is None and self.init_token_ids is None:
            raise ValueError(f"DePTConfig: init_text={self.init_text!r} needs tokenizer_name_or_path")
        if self.init_token_ids is not None and not self.init_token_ids:
            raise ValueError("DePTConfig: init_token_ids must have at least one token id, got none")
        if self.scale is None:
            self.scale = 8 / self.r**0.5
