"""moezoo_models: a decoder language model built from the zoo's layers.

Importing this makes ``AutoConfig`` and ``AutoModelForCausalLM`` of transformers know the models,
and mixtures of transformers know ``experts_implementation="moezoo"``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moezoo.stock_experts import register_experts
from moezoo_models.model.causal_lm import MoezooForCausalLM
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.decoder import MoezooModel
from moezoo_models.model.outputs import MoezooOutput

AutoConfig.register(MoezooConfig.model_type, MoezooConfig, exist_ok=True)
AutoModel.register(MoezooConfig, MoezooModel, exist_ok=True)
AutoModelForCausalLM.register(MoezooConfig, MoezooForCausalLM, exist_ok=True)
register_experts()

__all__ = ["MoezooConfig", "MoezooForCausalLM", "MoezooModel", "MoezooOutput"]
