"""Post-training pruning of language models in JAX.

`__init__.pyi` lists the exported names. Each is imported when it is first used.
"""

import importlib.util

import lazy_loader

if (_spec := importlib.util.find_spec("convert")) and not _spec.submodule_search_locations:
    raise ImportError(
        f"{_spec.origin} hides jaxprune's package of the name convert: rename it, or work elsewhere"
    )

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
