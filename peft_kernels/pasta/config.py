"""``PASTAConfig`` and the PEFT type ``PASTA``."""

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from ..hf.peft_method import peft_type

INITS = ("normal", "zero")
OVERFLOWS = ("error", "last")
PASTA = peft_type("PASTA")


@dataclass
class PASTAConfig(PeftConfig):
    """Special token adaptation (arXiv 2210.04382): every layer adds a vector to its input at every special token.

    The special tokens of a row, [CLS] and each [SEP], are counted from 0: number j has its own vector in every layer,
    shared by all rows. L layers of width d have L * P * d parameters. Padding and [MASK] get no vector.

    Args:
        num_special_tokens: P, the number of special tokens of a row with their own vectors: 2 for ``[CLS] a [SEP]``, 3
            for ``[CLS] a [SEP] b [SEP]``, 4 for RoBERTa's pairs ``<s> a </s></s> b </s>``.
        special_token_ids: ids of the special tokens. None: the tokenizer's ``cls_token_id`` and ``sep_token_id``
            (``bos_token_id`` and ``eos_token_id`` if it has none), which are then stored here, so that loading an
            adapter needs no tokenizer.
        tokenizer_name_or_path: the tokenizer for ``special_token_ids``. None: the model's own, if it is available
            offline.
        dropout: dropout of the vectors in training, drawn for every row and special token.
        init: ``"normal"``, N(0, 0.02^2), or ``"zero"``, which starts from the unchanged model.
        overflow: treatment of special tokens beyond P: ``"error"`` refuses the row; ``"last"`` gives them the last
            vector.
        modules_to_save: further modules to train and save, as in every PEFT method. The head of a classification model
            is added.

    Raises:
        ValueError: a value is out of range.
    """

    num_special_tokens: int = field(default=2)
    special_token_ids: list[int] | None = field(default=None)
    tokenizer_name_or_path: str | None = field(default=None)
    dropout: float = field(default=0.1)
    init: str = field(default="normal")
    overflow: str = field(default="error")
    modules_to_save: list[str] | None = field(default=None)

    # not a field: tells PEFT that there are no modules to replace
    target_modules = DUMMY_TARGET_MODULES

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PASTA
        if not isinstance(self.num_special_tokens, int) or self.num_special_tokens < 1:
            raise ValueError(
                f"PASTAConfig: num_special_tokens must be an integer of at least 1, got {self.num_special_tokens!r}"
            )
        ids = self.special_token_ids
        if ids is not None and (isinstance(ids, str) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids)):
            raise ValueError(
                f"PASTAConfig: special_token_ids must be one token id or more, each at least 0, got {ids!r}"
            )
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"PASTAConfig: dropout must lie in [0, 1), got {self.dropout!r}")
        for name, allowed in (("init", INITS), ("overflow", OVERFLOWS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"PASTAConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        if ids is not None:
            self.special_token_ids = list(dict.fromkeys(ids))
