"""The decoder as a causal language model: logits, loss, generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from moezoo.errors import InputError
from moezoo_models.model.config import MoezooConfig
from moezoo_models.model.decoder import MoezooModel, MoezooPreTrainedModel
from moezoo_models.model.head import IGNORED, Head, next_token_loss, shaped_logits
from moezoo_models.model.outputs import MoezooOutput


class MoezooForCausalLM(MoezooPreTrainedModel, GenerationMixin):
    """The decoder with its output projection: a causal language model.

    Around the feed-forward blocks it is by default a Llama (Touvron et al. 2023,
    arXiv:2302.13971).

    Args:
        config: sizes, and the rules that choose each layer's block.

    Raises:
        InputError: a field is out of range, or the attention backend is not usable here.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoezooConfig) -> None:
        super().__init__(config)
        self.model = MoezooModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | Mapping[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> MoezooOutput:
        """Run the model; with labels, compute its loss.

        Args:
            input_ids: as for :meth:`MoezooModel.forward`.
            attention_mask: as there.
            position_ids: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            labels: ``(batch, sequence)`` int64, the tokens themselves, shifted in here as is
                transformers' convention; -100 is left out.
            use_cache: as there; off by default where there are labels.
            logits_to_keep: compute logits for that many last positions only, or for those
                positions; 0 for all. Not together with labels.
            return_logits: false, with labels, for the loss alone: no more than a chunk of the
                logits is made at a time (:func:`moezoo_kernels.linear_cross_entropy`).
            kwargs: ``shift_labels``, ``(batch, sequence)`` int64, the next tokens in place of
                ``labels``; not by name above, where transformers' trainer would take them for
                labels that every batch has. ``token_mask``, ``output_hidden_states``,
                ``output_attentions``, and what the attention backend takes.

        Returns:
            The losses in fp32, and the logits in the dtype of the weights, or of autocast; a tuple
            of what is there if ``return_dict`` is false.

        Raises:
            InputError: as for :meth:`MoezooModel.forward`; labels given twice; neither labels nor
                ``return_logits``.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        if labels is not None:
            if shift_labels is not None:
                raise InputError("labels: give labels or shift_labels, not both")
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if shift_labels is None and not return_logits:
            raise InputError("return_logits: false goes with labels only; give labels, or true")
        if use_cache is None and shift_labels is not None:
            use_cache = False
        return_dict = kwargs.pop("return_dict", None)  # PEFT passes None on
        if return_dict is None:
            return_dict = self.config.return_dict
        decoded = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = decoded.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = loss = lm_loss = None
        capped = self.config.final_logit_softcapping is not None
        # A head that is adapted makes logits only, and capped ones are wanted one by one.
        if return_logits or capped or not isinstance(self.lm_head, Head):
            logits = shaped_logits(self.lm_head(hidden), self.config)
        if shift_labels is not None:
            if logits is None:
                scaling = self.config.logits_scaling
                lm_loss = self.lm_head(hidden if scaling == 1.0 else hidden / scaling, shift_labels)
            else:
                lm_loss = next_token_loss(logits, shift_labels)
            loss = sum(decoded.aux_losses.values(), lm_loss)
        aux = list(decoded.aux_losses.values())
        output = MoezooOutput(
            loss=loss,
            lm_loss=lm_loss,
            logits=logits if return_logits else None,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            aux_losses=decoded.aux_losses,
            ffn_stats=decoded.ffn_stats,
            memory_stats=decoded.memory_stats,
            aux_loss=sum(aux[1:], aux[0]) if aux else None,
        )
        return output if return_dict else output.to_tuple()  # type: ignore[return-value]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare one step of generation, as in transformers.

        For static caches that prepares four-dimensional masks, from which padding cannot be told
        any more: the feed-forward blocks get theirs beforehand. Those that route on earlier tokens
        get all tokens so far, which the cache does not hold. Where rotary embeddings of kind
        longrope go over to their long factors, keys are turned anew: the cache begins again.
        """
        if _outgrown(kwargs.get("past_key_values"), input_ids.shape[1], self.config):
            kwargs |= {"past_key_values": None, "next_sequence_length": None}
        prepare: Any = GenerationMixin.prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(self, input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.ndim == 2:
            current = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if current is None else current).shape[1]
            inputs["token_mask"] = attention_mask[:, -length:].to(torch.bool)
        if self.model.looks_back():
            inputs["context_ids"], inputs["context_mask"] = input_ids, attention_mask
        return inputs


def _outgrown(cache: Cache | None, length: int, config: MoezooConfig) -> bool:
    """Return whether keys in a cache are turned by factors that a text is too long for by now."""
    rope = config.rope_parameters
    if cache is None or rope.get("rope_type") != "longrope" or config.positions != "rotary":
        return False
    return cache.get_seq_length() <= rope["original_max_position_embeddings"] < length
