"""moezoo_models: a decoder language model built from the zoo's layers.

Importing this makes ``AutoConfig`` and ``AutoModelForCausalLM`` of transformers know the models.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.decoder import MoezooModel
from moezoo_models.model.outputs import MoezooOutput

AutoConfig.register(MoezooConfig.model_type, MoezooConfig, exist_ok=True)
AutoModel.register(MoezooConfig, MoezooModel, exist_ok=True)
AutoModelForCausalLM.register(MoezooConfig, MoezooForCausalLM, exist_ok=True)

__all__ = ["MoezooConfig", "MoezooForCausalLM", "MoezooModel", "MoezooOutput"]
