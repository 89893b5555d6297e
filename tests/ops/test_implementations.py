"""Every implementation of every operator has the functions that a protocol of the operator's package declares."""

from importlib import import_module
from inspect import Parameter, signature

import pytest

from peft_kernels.ops import registry
from peft_kernels.ops.implementations import Implementation

PACKAGES = {name: import_module(f"peft_kernels.ops.{name}") for name in registry.packages()}
IMPLEMENTATIONS = [(name, impl) for name, package in PACKAGES.items() for impl in package.implementations.names]


def functions(protocol):
    members = {name: x for base in protocol.__mro__ if Implementation in base.__mro__ for name, x in vars(base).items()}
    return {name: x for name, x in members.items() if callable(x) and not name.startswith("_")}


def protocol_of(package, module):
    """Returns the protocol with the most functions that the module has."""
    protocols = [x for x in vars(package).values() if Implementation in getattr(x, "__mro__", ())[1:]]
    complete = [x for x in protocols if all(hasattr(module, function) for function in functions(x))]
    assert complete, f"{module.__name__} lacks functions of {[x.__name__ for x in protocols]}"
    return max(complete, key=lambda x: len(functions(x)))


@pytest.mark.parametrize(("name", "impl"), IMPLEMENTATIONS)
def test_functions_and_their_arguments(name, impl):
    """A function may name the last arguments together (``*needs``), and have more arguments with a default."""
    module = PACKAGES[name].implementations.module(impl)
    for function, declared in functions(protocol_of(PACKAGES[name], module)).items():
        expected = list(signature(declared).parameters)[1:]
        parameters = list(signature(getattr(module, function)).parameters.values())
        named = [x.name for x in parameters if x.kind != Parameter.VAR_POSITIONAL]
        required = [x.name for x in parameters if x.kind != Parameter.VAR_POSITIONAL and x.default is Parameter.empty]
        together = len(named) < len(parameters)
        assert (expected[: len(named)] if together else expected) == named[: len(expected)], function
        assert len(required) <= len(expected), function


def test_which_implementations_are_absorbed():
    package = PACKAGES["label_cross_attention"]
    modules = {impl: package.implementations.module(impl) for impl in package.implementations.names}
    absorbed = [impl for impl, x in modules.items() if protocol_of(package, x) is package.AbsorbedImplementation]
    assert absorbed == list(package.ABSORBED)
