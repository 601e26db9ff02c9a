"""Separable neural architectures for Hugging Face transformers; importing this registers every Auto class.

What is named here is imported when it is first asked for: the models need all of PyTorch and transformers.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from leviathan.registration import register_with_transformers

if TYPE_CHECKING:
    from leviathan.configuration_leviathan import LeviathanConfig
    from leviathan.generation_leviathan import ExpectationLogitsProcessor, rollout
    from leviathan.janus import SnaJanusConfig, SnaJanusModel
    from leviathan.khronos import KhronosConfig, KhronosForClassification, KhronosModel
    from leviathan.modeling_leviathan import LeviathanForCausalLM, LeviathanModel, LeviathanPreTrainedModel
    from leviathan.repository import export
    from leviathan.sna import SnaConfig, SnaModel
    from leviathan.span import SpanConfig, SpanModel
    from leviathan.tokenization_leviathan import FieldTokenizer
    from leviathan.vsna import VsnaConfig, VsnaModel

__version__ = "0.1.0"

__all__ = [
    "ExpectationLogitsProcessor",
    "FieldTokenizer",
    "KhronosConfig",
    "KhronosForClassification",
    "KhronosModel",
    "LeviathanConfig",
    "LeviathanForCausalLM",
    "LeviathanModel",
    "LeviathanPreTrainedModel",
    "SnaConfig",
    "SnaJanusConfig",
    "SnaJanusModel",
    "SnaModel",
    "SpanConfig",
    "SpanModel",
    "VsnaConfig",
    "VsnaModel",
    "export",
    "rollout",
]

# The same as type checkers read above.
_MODULES = {
    "ExpectationLogitsProcessor": "generation_leviathan",
    "FieldTokenizer": "tokenization_leviathan",
    "KhronosConfig": "khronos",
    "KhronosForClassification": "khronos",
    "KhronosModel": "khronos",
    "LeviathanConfig": "configuration_leviathan",
    "LeviathanForCausalLM": "modeling_leviathan",
    "LeviathanModel": "modeling_leviathan",
    "LeviathanPreTrainedModel": "modeling_leviathan",
    "SnaConfig": "sna",
    "SnaJanusConfig": "janus",
    "SnaJanusModel": "janus",
    "SnaModel": "sna",
    "SpanConfig": "span",
    "SpanModel": "span",
    "VsnaConfig": "vsna",
    "VsnaModel": "vsna",
    "export": "repository",
    "rollout": "generation_leviathan",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    elif name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        found = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
