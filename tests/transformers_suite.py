"""The classes that transformers' mixins test: run from a tree of theirs, by `python -m eval.conformance`."""

import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_feature_extraction_common import FeatureExtractionSavingTestMixin
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

import leviathan

# The mixins look up by these names which labels a class wants, and know no registered classes.
modeling_auto.MODEL_MAPPING_NAMES["leviathan"] = "LeviathanModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["leviathan"] = "LeviathanForCausalLM"

BATCH, TOKENS, VOCABULARY = 3, 7, 99


class LeviathanTester:
    """A tiny Leviathan and its inputs, in the mixins' names."""

    causal_lm_class, base_model_class = leviathan.LeviathanForCausalLM, leviathan.LeviathanModel
    batch_size, seq_length, encoder_seq_length, key_length = BATCH, TOKENS, TOKENS, TOKENS
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size, is_training = 2, 4, 32, VOCABULARY, True

    def __init__(self, **options):
        self.options = options

    def get_config(self):
        sizes = {name: getattr(self, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")}
        sizes |= {"vocab_size": VOCABULARY, "intermediate_size": 48, "max_position_embeddings": 512}
        sizes["initializer_range"] = 0.2  # generated embeddings start nearly alike; what attention does should be seen
        if self.options.get("embedding_type", "separable") == "separable":
            sizes |= {"embedding_seed_dim": 8, "embedding_num_heads": 2, "embedding_rank": 4}
        return leviathan.LeviathanConfig(pad_token_id=0, **sizes, **self.options)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, VOCABULARY, (BATCH, TOKENS))
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long).tril()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class _Language(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (leviathan.LeviathanModel, leviathan.LeviathanForCausalLM)
    pipeline_model_mapping = {"feature-extraction": leviathan.LeviathanModel}
    options: dict = {}
    _torch_compile_train_cls = leviathan.LeviathanForCausalLM

    @property
    def model_tester(self):
        return LeviathanTester(**self.options)

    def test_config(self):
        tester = ConfigTester(self, config_class=leviathan.LeviathanConfig, hidden_size=32, num_attention_heads=4)
        tester.run_common_tests()


class LeviathanTest(_Language, unittest.TestCase):
    """Embeddings that are generated, a head that is dense."""


class LeviathanLookupTest(_Language, unittest.TestCase):
    """A table, as LLaMA has it."""

    options = {"embedding_type": "lookup"}


class LeviathanDigitsTest(_Language, unittest.TestCase):
    """A head of digits."""

    options = {"output_head": "digits", "output_head_rank": 8, "embedding_base": 10}


class _Function(ModelTesterMixin):
    """Models of numbers: no tokens, no attention, no embeddings."""

    has_attentions = test_resize_embeddings = False
    config_class: type
    options: dict = {}

    @property
    def model_tester(self):
        return self

    is_training, batch_size = True, BATCH

    def get_config(self):
        return self.config_class(**self.options)

    def inputs(self):
        return {"x": torch.rand(BATCH, 2)}

    def labels(self):
        return torch.rand(BATCH, 1)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.inputs()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | {"labels": self.labels()} if return_labels else inputs

    def test_config(self):
        options = {"has_text_modality": False, "common_properties": [], **self.options}
        ConfigTester(self, config_class=self.config_class, **options).run_common_tests()


class KhronosTest(_Function, unittest.TestCase):
    all_model_classes = (leviathan.KhronosModel,)
    config_class = leviathan.KhronosConfig
    options = {"input_low": [0.0, 0.0], "input_high": [1.0, 1.0], "rank": 2, "num_cells": 3}


class KhronosForClassificationTest(KhronosTest):
    all_model_classes = (leviathan.KhronosForClassification,)

    def labels(self):
        return torch.randint(2, (BATCH,))


class SnaTest(_Function, unittest.TestCase):
    all_model_classes = (leviathan.SnaModel,)
    config_class = leviathan.SnaConfig
    options = {"num_inputs": 2, "rank": 2, "num_cells": 3}


class SpanTest(_Function, unittest.TestCase):
    all_model_classes = (leviathan.SpanModel,)
    config_class = leviathan.SpanConfig
    options = {"num_inputs": 2, "latent_dim": 3, "rank": 2, "num_cells": 3}


class VsnaTest(_Function, unittest.TestCase):
    all_model_classes = (leviathan.VsnaModel,)
    config_class = leviathan.VsnaConfig
    options = {"axes": [{"name": name, "low": 0.0, "high": 1.0, "num_cells": 3} for name in "xt"], "rank": 2}

    def inputs(self):
        return {"points": torch.rand(BATCH, 2)}


class SnaJanusTest(_Function, unittest.TestCase):
    all_model_classes = (leviathan.SnaJanusModel,)
    config_class = leviathan.SnaJanusConfig
    options = {
        **{"resolution": 4, "channels": [4], "latent_dim": 4, "head_rank": 2, "num_codes": 4},
        **{"property_names": ["C1111", "volume_fraction"], "property_mean": [150.0, 0.45]},
        **{"property_std": [80.0, 0.1], "property_low": [0.0, 0.1], "property_high": [400.0, 0.8]},
    }

    def inputs(self):
        return {"cells": torch.rand(BATCH, 4, 4, 4).round()}

    def labels(self):
        return torch.rand(BATCH, 2)


class FieldTokenizerTest(FeatureExtractionSavingTestMixin, unittest.TestCase):
    feature_extraction_class = leviathan.FieldTokenizer
    feat_extract_dict = {"patch_size": 4, "num_bits": 4, "base": 4, "low": -1.0, "high": 1.0}
