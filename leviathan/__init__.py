"""Separable neural architectures for Hugging Face transformers; importing this registers every Auto class."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM

from leviathan.configuration_leviathan import LeviathanConfig
from leviathan.generation_leviathan import ExpectationLogitsProcessor, rollout
from leviathan.modeling_leviathan import LeviathanForCausalLM, LeviathanModel, LeviathanPreTrainedModel
from leviathan.tokenization_leviathan import FieldTokenizer

__version__ = "0.1.0"

AutoConfig.register(LeviathanConfig.model_type, LeviathanConfig)
AutoModel.register(LeviathanConfig, LeviathanModel)
AutoModelForCausalLM.register(LeviathanConfig, LeviathanForCausalLM)
AutoFeatureExtractor.register(LeviathanConfig, FieldTokenizer)

__all__ = [
    "ExpectationLogitsProcessor",
    "FieldTokenizer",
    "LeviathanConfig",
    "LeviathanForCausalLM",
    "LeviathanModel",
    "LeviathanPreTrainedModel",
    "rollout",
]
