"""The native kernels compiled for lower instruction sets than this CPU's: a new process for each, because a process
chooses once.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels.ops import native_library

TESTS = {
    "test_shared_cross_attention_native.py": "test_forward or test_backward or test_strides or test_empty",
    "test_decomposed_prompt_embedding.py": "cpp and not cuda",
    "test_label_logits.py": "cpp and test_parity",
    "test_prototype_scores.py": "(cpp and (test_scores or test_cross_entropy)) or test_adam",
    "test_special_tokens.py": "cpp and test_parity",
    "test_add_layer_norm_inject.py": "cpp and (test_parity or test_widths)",
    "test_label_cross_attention.py": "cpp and (test_parity or test_widths or test_numbers_of_slots)",
}


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability):
    if native_library.load_error():
        pytest.skip(native_library.load_error())
    here = Path(__file__).parent
    selection = " or ".join(f"({file.removesuffix('.py')} and ({tests}))" for file, tests in TESTS.items())
    command = [sys.executable, "-m", "pytest", *(str(here / file) for file in TESTS), "-q", "-x", "-k", selection]
    environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": capability}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
