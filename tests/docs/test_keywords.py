"""Every keyword of the public API occurs in code on a page: a method's on the method's page, an operator's on any
page.
"""

import inspect
import re
from pathlib import Path

import pytest

from peft_kernels import dect, dept, ops, pasta, pid, ytuning

DOCS = Path(__file__).parents[2] / "docs"
MODULES = {module.__name__.rpartition(".")[2]: module for module in (ops, pid, dept, pasta, dect, ytuning)}


def keywords_of(module) -> dict[str, set[str]]:
    """Keywords of public functions, classes and their methods, without those inherited from other packages."""
    public = {name: getattr(module, name) for name in module.__all__}
    keywords = {}
    for name, value in public.items():
        bases = (
            [base for base in value.__mro__[1:-1] if not base.__module__.startswith("peft_kernels")]
            if inspect.isclass(value)
            else []
        )
        keywords[name] = parameters(value).difference(*map(parameters, bases))
        methods = [method for method in vars(value) if not method.startswith("_")] if inspect.isclass(value) else []
        for method in methods:
            if inspect.isroutine(getattr(value, method)):
                inherited = [parameters(getattr(base, method)) for base in bases if hasattr(base, method)]
                keywords[f"{name}.{method}"] = parameters(getattr(value, method)).difference(*inherited)
    return keywords


def parameters(value) -> set[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name
        for name, parameter in inspect.signature(value).parameters.items()
        if parameter.kind not in kinds and name != "self"
    }


def code_of(pages) -> str:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "\n".join(blocks + re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize("name", MODULES)
def test_every_keyword_is_on_a_page(name):
    pages = sorted(DOCS.glob("*.md")) if name == "ops" else [DOCS / f"{name}.md"]
    words = set(re.findall(r"\w+", code_of(pages)))
    missing = {
        function: sorted(absent)
        for function, keywords in keywords_of(MODULES[name]).items()
        if (absent := keywords - words)
    }
    assert missing == {}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_on_a_page(name):
    words = set(re.findall(r"\w+", code_of(sorted(DOCS.glob("*.md")))))
    assert set(MODULES[name].__all__) <= words
