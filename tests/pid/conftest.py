import pytest

from peft_kernels import pid


@pytest.fixture
def swapped():
    """``pid.enable`` for the duration of one test."""
    models = []

    def enable(model, **kwargs):
        models.append(model)
        return pid.enable(model, **kwargs)

    yield enable
    for model in models:
        pid.disable(model)
