"""What is done as soon as a package is imported, in either order: our operators beside torch's, our methods among PEFT's.

``import peft_kernels`` alone imports neither package, so that a command line that is mistyped is answered at once.
"""

import importlib
import sys
import warnings
from collections.abc import Callable


class _After:
    """Finds ``package`` as the finders behind it do, and calls ``act`` after it is imported."""

    def __init__(self, package: str, act: Callable[[], None]):
        self.package, self.act = package, act

    def find_spec(self, name, path, target=None):
        if name != self.package:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module):
                execute(module)
                self.act()

            spec.loader.exec_module = execute_and_act
        return spec


def _registering(module: str, lack: str) -> Callable[[], None]:
    def register():
        try:
            importlib.import_module(module, __package__)
        except Exception as error:  # whoever imports the package may want nothing of ours
            warnings.warn(f"peft_kernels: {lack}, because {type(error).__name__}: {error}", stacklevel=2)

    return register


_REGISTER = {
    "torch": _registering("..ops", "torch does not know its operators"),  # those that a saved torch.export program names
    "torch.utils.flop_counter": _registering("..ops.flops", "FlopCounterMode does not count its operators"),
    "peft": _registering(".peft_method", "PEFT does not know DePT and PASTA"),
}


def register_when_imported() -> None:
    for package, register in _REGISTER.items():
        if package in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, _After(package, register))
