"""Every text class of transformers, under both PEFT methods: as stock, or refused in a sentence. ``make test-families`` runs this."""

import pytest
import torch
from checks import CHECKS, Refused, Unusable, adapt, is_causal_in_fact
from tiny import build, classes

from peft_kernels import DePTConfig

CLASSES = classes()
# by configuration class: why its models are not built
NOT_BUILT = {}
# by class: what the stock model needs beside text
NOT_TEXT_ALONE = {}
# by class: what DePT says of it
REFUSED_BY_DEPT = {}
# by class: what PASTA says of it, where it is no decoder
REFUSED_BY_PASTA = {}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CLASSES)
def test_equal_or_refused(name, check):
    base = _built(name)
