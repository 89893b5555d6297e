"""Our methods among PEFT's as soon as both packages are imported, in either order; ``import peft_kernels`` alone imports no PEFT."""

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder


class _BeforePeft(MetaPathFinder):
    """Finds PEFT as the finders behind it do, and registers our methods after it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "peft":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register():
    try:
        importlib.import_module(".peft_method", __package__)
    except Exception as error:  # whoever imports PEFT may want nothing of ours
        warnings.warn(f"peft_kernels: PEFT does not know DePT and PASTA, because {type(error).__name__}: {error}", stacklevel=2)


def register_when_imported() -> None:
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _BeforePeft())
