"""Registers the package's classes with transformers' Auto classes, no earlier than somebody imports those.

Registering takes the classes themselves, and a model's class takes `transformers.modeling_utils`, whose import is
slower than all else. So `import leviathan` leaves an importer on `sys.meta_path`. It finds nothing itself; it waits
until transformers' Auto classes are imported, registers ours, and takes itself away.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # which every other module of Auto classes imports
WATCHED = ("transformers", "leviathan")


def register_with_transformers() -> None:
    """Registers every class, at once if transformers' Auto classes are there already, else as soon as they are."""
    if AUTO_CLASSES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Registering())


def _register() -> None:
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM

    from leviathan.configuration_leviathan import LeviathanConfig
    from leviathan.janus import SnaJanusConfig, SnaJanusModel
    from leviathan.khronos import KhronosConfig, KhronosModel
    from leviathan.modeling_leviathan import LeviathanForCausalLM, LeviathanModel
    from leviathan.sna import SnaConfig, SnaModel
    from leviathan.span import SpanConfig, SpanModel
    from leviathan.tokenization_leviathan import FieldTokenizer
    from leviathan.vsna import VsnaConfig, VsnaModel

    models: dict[Any, Any] = {  # of classes
        LeviathanConfig: LeviathanModel,
        KhronosConfig: KhronosModel,
        SnaConfig: SnaModel,
        SnaJanusConfig: SnaJanusModel,
        SpanConfig: SpanModel,
        VsnaConfig: VsnaModel,
    }
    for config, model in models.items():
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
    AutoModelForCausalLM.register(LeviathanConfig, LeviathanForCausalLM)
    AutoFeatureExtractor.register(LeviathanConfig, FieldTokenizer)


class _Registering(MetaPathFinder):
    """Registers when the outermost import of a module of transformers or of ours ends that brought the Auto classes.

    Not sooner: `transformers.modeling_layers`, for one, imports the Auto classes itself, and is of no use to our models
    until it is complete.
    """

    def __init__(self) -> None:
        self._depth = threading.local()  # of imports within one another

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with a loader that tells us of the end of the import."""
        if fullname.partition(".")[0] not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    loader: Any = spec.loader
                    loader.exec_module = self._counted(loader.exec_module)
                return spec
        return None

    def _counted(self, exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def counted(module: ModuleType) -> None:
            depth = getattr(self._depth, "value", 0)
            self._depth.value = depth + 1
            try:
                exec_module(module)
                if depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
                    _register()
                    with suppress(ValueError):  # another thread was faster
                        sys.meta_path.remove(self)
            finally:
                self._depth.value = depth

        return counted
