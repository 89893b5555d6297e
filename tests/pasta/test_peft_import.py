"""A saved adapter loads after ``import peft_kernels``, in every order of imports, each in a new process."""

import subprocess
import sys

import pytest

KNOWN = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m; assert {'DEPT', 'PASTA'} <= {k.value for k in m}"


def _run(code):
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:peft_kernels", "-c", code],
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("order", ["import peft, peft_kernels", "import peft_kernels.hf.peft_method"])
def test_registered(order):
    _run(f"{order}; {KNOWN}")


def test_loading(tmp_path):
    """The class name alone is enough, with the usual imports for PEFT."""
    import pasta_models

    pasta_models.adapted("bert").save_pretrained(tmp_path)
    code = f"""
import importlib.util

import peft_kernels

importlib.util.find_spec("peft")  # as transformers asks whether there is one
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification

base = BertForSequenceClassification(BertConfig(**{pasta_models.FAMILIES["bert"][1]}))
model = PeftModel.from_pretrained(base, {str(tmp_path)!r})
{KNOWN}
print(model.base_model.model.pasta.pasta_vectors["default"].sum().item())
"""
    assert float(_run(code).stdout) == pasta_models.vectors(pasta_models.adapted("bert")).sum().item()


def test_a_peft_that_does_not_fit(tmp_path):
    """PEFT's import succeeds, with a warning that says what is missing."""
    (tmp_path / "peft.py").write_text("")
    code = f"import sys, peft_kernels; sys.path.insert(0, {str(tmp_path)!r}); import peft; print('imported')"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "imported\n" and "PEFT does not know DePT and PASTA, because ImportError" in run.stderr
