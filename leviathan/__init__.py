"""Separable neural architectures for Hugging Face transformers; importing this registers every Auto class."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM

from leviathan.configuration_leviathan import LeviathanConfig
from leviathan.generation_leviathan import ExpectationLogitsProcessor, rollout
from leviathan.janus import SnaJanusConfig, SnaJanusModel
from leviathan.khronos import KhronosConfig, KhronosForClassification, KhronosModel
from leviathan.modeling_leviathan import LeviathanForCausalLM, LeviathanModel, LeviathanPreTrainedModel
from leviathan.sna import SnaConfig, SnaModel
from leviathan.span import SpanConfig, SpanModel
from leviathan.tokenization_leviathan import FieldTokenizer
from leviathan.vsna import VsnaConfig, VsnaModel

__version__ = "0.1.0"

AutoConfig.register(LeviathanConfig.model_type, LeviathanConfig)
AutoConfig.register(KhronosConfig.model_type, KhronosConfig)
AutoConfig.register(SnaConfig.model_type, SnaConfig)
AutoConfig.register(SnaJanusConfig.model_type, SnaJanusConfig)
AutoConfig.register(SpanConfig.model_type, SpanConfig)
AutoConfig.register(VsnaConfig.model_type, VsnaConfig)
AutoModel.register(LeviathanConfig, LeviathanModel)
AutoModel.register(KhronosConfig, KhronosModel)
AutoModel.register(SnaConfig, SnaModel)
AutoModel.register(SnaJanusConfig, SnaJanusModel)
AutoModel.register(SpanConfig, SpanModel)
AutoModel.register(VsnaConfig, VsnaModel)
AutoModelForCausalLM.register(LeviathanConfig, LeviathanForCausalLM)
AutoFeatureExtractor.register(LeviathanConfig, FieldTokenizer)

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
    "rollout",
]
