"""The nodes, one class per file: a module here with a `NODE` is one, its id the class's name."""

import importlib
import pkgutil

from .host import keep_machine_code

_MODULES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
_NODES = [m.NODE for m in _MODULES if hasattr(m, "NODE")]

NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: node.DISPLAY_NAME for node in _NODES}
keep_machine_code()
