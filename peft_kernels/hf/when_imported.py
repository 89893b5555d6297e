"""Registers our operators once torch is imported and our methods once PEFT is imported, before or after this package.

``import peft_kernels`` alone imports neither, so that the command line answers bad input at once.
"""

import importlib
import sys
import warnings
from collections.abc import Callable


class _AfterImport:
    """A finder that leaves ``package`` to the other finders and calls ``callback`` once it is imported."""

    def __init__(self, package: str, callback: Callable[[], None]):
        self.package, self.callback = package, callback

    def find_spec(self, name, path, target=None):
        if name != self.package:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_call(module):
                execute(module)
                self.callback()

            spec.loader.exec_module = execute_and_call
        return spec


def _registering(module: str, consequence: str) -> Callable[[], None]:
    def register():
        try:
            importlib.import_module(module, __package__)
        except Exception as error:  # the import of torch or PEFT itself must not fail
            warnings.warn(f"peft_kernels: {consequence}, because {type(error).__name__}: {error}", stacklevel=2)

    return register


_REGISTER = {
    "torch": _registering("..ops", "torch does not know its operators"),  # a saved torch.export program may use them
    "torch.utils.flop_counter": _registering("..ops.flops", "FlopCounterMode does not count its operators"),
    "peft": _registering(".peft_method", "PEFT does not know DePT and PASTA"),
}


def register_when_imported() -> None:
    for package, register in _REGISTER.items():
        if package in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _AfterImport(package, register))
