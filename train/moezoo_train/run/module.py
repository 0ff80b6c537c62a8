"""The language model as Lightning trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from moezoo import DenseFFN, FeedForward
from moezoo.arguments import plain
from moezoo.errors import InputError, check_int
from moezoo.router_input import FFN_INPUT, RouterInput
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.adapters.transformers import set_attention_backend
from moezoo_models.checkpoints.stock import predict
from moezoo_models.model.attention_experts import AttentionExperts
from moezoo_models.model.initialization import DeferredInit, deferred_init
from moezoo_models.model.latent_options import LatentAttentionOptions
from moezoo_models.text.tokenizer import Tokenizer
from moezoo_train.adapters.lightning import attached_trainer
from moezoo_train.checkpoint import finite, identity
from moezoo_train.checkpoint_structure import CONFIG_KEY, check_same
from moezoo_train.finetune import pretrained as start
from moezoo_train.finetune.lora import LoRAOptions, trained_state
from moezoo_train.finetune.neurons import NeuronOptions
from moezoo_train.finetune.parts import TrainedPart
from moezoo_train.finetune.saving import save_model
from moezoo_train.finetune.sparse_memory import SparseMemory, SparseMemoryOptions
from moezoo_train.measure.metrics import TrainingMetrics
from moezoo_train.measure.throughput import ffn_layers
from moezoo_train.optim import clipping
from moezoo_train.optim.optimizer import OptimizerConfig, build_optimizer, is_sparse
from moezoo_train.optim.schedule import RunSchedule, ScheduleConfig
from moezoo_train.parallel.distributed import average_sparse_gradients, process_count
from moezoo_train.parallel.fit_strategy import check_sparse_gradients, parallelize_for
from moezoo_train.parallel.state_dicts import full_shape_state_dict, full_state_dict, is_sharded
from moezoo_train.parallel.zero import ZeROStrategy
from moezoo_train.run.callbacks import RandomState
from moezoo_train.run.evaluated import EvaluatedModule, share_of_scored
from moezoo_train.run.guard import SpikeRule, StepGuard
from moezoo_train.run.hash_tables import HashTables
from moezoo_train.run.presets import check_preset
from moezoo_train.run.rules import FFNRule as FFNRule
from moezoo_train.run.rules import block_rules
from moezoo_train.run.steps import run_steps, stand_between_batches, take_whole_steps


class LanguageModel(EvaluatedModule):
    """A :class:`MoezooForCausalLM` and how it is trained.

    Batches are ``{"input_ids": (B, S), "labels": (B, S)}``, int64, where labels are the next
    tokens and -100 is ignored.

    Args:
        vocab_size: tokens of the vocabulary; on the command line it comes from the data.
        d_model: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads; d_model must be a multiple, or head_dim given.
        num_kv_heads: key-value heads, for grouped-query attention; default: num_heads.
        head_dim: width of a head, even; default: d_model / num_heads.
        rope_theta: base of the rotary embedding.
        qk_norm: normalise queries and keys, as Qwen3 does.
        qk_norm_over: per ``head``, or over all heads of a ``projection``, as OLMoE does.
        latent_attention: options of DeepSeek-V2's attention, in place of grouped queries.
        attention_bias: biases in the query, key and value projections, as Qwen2 has.
        attention_output_bias: a bias in the attention's output projection, as GPT-OSS has.
        norm: ``rms``, or ``layer`` for LayerNorm.
        norm_eps: added to mean squares in norms.
        parallel: the feed-forward block runs beside attention, with ``one_norm`` or ``two_norms``.
        attention_experts: let the experts of mixtures answer what attention mixes, as UMoE does.
        tie_embeddings: share the input embedding with the output head.
        attention: attention backend: sdpa, eager, flash_attention_2, flex_attention or xformers.
        max_length: longest sequence the model is made for.
        ffn: the feed-forward layer of every block.
        router_input: what its router reads: ``ffn_input``, as the experts do; ``pre_attention``,
            the residual stream that enters the block; or ``post_attention``, that after attention.
        ffn_rules: exceptions to ffn, each with a router_input of its own; later ones win.
        memory: layers that blocks add beside ffn: layers, class_path and init_args; one or several.
        allow_non_causal: accept layers in which a token sees later tokens (expert choice).
        initialize_from: a directory to take model and weights from: ours, or a stock one that
            `moezoo upcycle` or `carve` read or write; what would describe the model otherwise
            (d_model, ffn, …) is then ignored.
        lora: train low-rank adapters of that model instead of all of it.
        neurons: of that model, train slices of some neurons of its dense blocks only.
        build_in_parts: defer initialization until processes shard the model, block by block, so
            that none holds all of it; it is the same model. For trainer.strategy fsdp2.
        sparse_memory: of that model, train the tables of values only, and of those, in each step,
            the rows that its batch reads more than other text.
        preset: published model that gives the command line its defaults; here only a name.
        hash_embeddings_from: a Hugging Face directory of a trained model with the same tokenizer;
            clustered and dispersed hash tables follow its token embeddings.
        optimizer: how parameters are updated.
        schedule: how the learning rate moves.
        compile: compile the model with torch.compile; minutes of warm-up on a CPU.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        on_nan: at a loss or gradient that is not finite ``stop``, or ``skip`` ten steps in a row.
        spikes: which finite steps are skipped, because loss or gradient leaps; default: none.

    Attributes:
        model: the model itself.
        grad_norm: norm of the last step's whole gradient before clipping.
        clip_group_norms: of that, the norms of the clip groups that layers have set apart.
        guard: judges the steps, and counts those that are skipped.

    Raises:
        InputError: an argument is out of range, or does not fit another.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        qk_norm: bool = False,
        qk_norm_over: Literal["head", "projection"] = "head",
        latent_attention: LatentAttentionOptions | None = None,
        attention_bias: bool = False,
        attention_output_bias: bool = False,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-6,
        parallel: Literal["none", "one_norm", "two_norms"] = "none",
        attention_experts: AttentionExperts | None = None,
        tie_embeddings: bool = True,
        attention: str = "sdpa",
        max_length: int = 1024,
        ffn: Callable[[int], FeedForward] = DenseFFN,
        router_input: RouterInput = FFN_INPUT,
        ffn_rules: list[FFNRule] | None = None,
        memory: dict[str, Any] | list[dict[str, Any]] | None = None,
        allow_non_causal: bool = False,
        initialize_from: str | None = None,
        lora: LoRAOptions | None = None,
        neurons: NeuronOptions | None = None,
        build_in_parts: bool = False,
        sparse_memory: SparseMemoryOptions | None = None,
        preset: str | None = None,
        hash_embeddings_from: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008 - frozen
        compile: bool = False,
        activation_checkpointing: bool = False,
        on_nan: Literal["stop", "skip"] = "stop",
        spikes: SpikeRule | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.schedule = RunSchedule(schedule)
        self.hash_embeddings_from = hash_embeddings_from
        self.compile_model = compile
        self.guard = StepGuard(on_nan, spikes)
        self.part = TrainedPart(lora, neurons, sparse_memory)
        self.part.check(initialize_from, optimizer, compile)
        check_preset(preset, initialize_from)
        self.initialize_from = initialize_from
        self.model: PreTrainedModel
        self.deferred_init: DeferredInit | None = None
        if initialize_from is not None:
            self.model = start.pretrained(initialize_from, vocab_size, attention, build_in_parts)
            self.part.prepare(self.model, initialize_from)
        else:
            with identity.own_names():
                config = MoezooConfig(
                    vocab_size=vocab_size,
                    hidden_size=check_int("d_model", d_model),
                    num_hidden_layers=num_layers,
                    num_attention_heads=num_heads,
                    num_key_value_heads=num_kv_heads,
                    head_dim=head_dim,
                    rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
                    qk_norm=qk_norm,
                    qk_norm_over=qk_norm_over,
                    latent_attention=asdict(latent_attention) if latent_attention else None,
                    attention_bias=attention_bias,
                    attention_output_bias=attention_output_bias,
                    norm=norm,
                    rms_norm_eps=norm_eps,
                    parallel=parallel,
                    attention_experts=plain(attention_experts),
                    tie_word_embeddings=tie_embeddings,
                    max_position_embeddings=max_length,
                    **block_rules(d_model, FFNRule("all", ffn, router_input), ffn_rules, memory),
                    allow_non_causal=allow_non_causal,
                )
                set_attention_backend(config, attention)
                with deferred_init(build_in_parts) as self.deferred_init:
                    self.model = MoezooForCausalLM(config)
        if activation_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in ffn_layers(self.model):
            layer.defer_state()  # until a step is judged
        self.model.train()
        self.grad_norm = math.nan
        self.clip_group_norms: dict[str, float] = {}
        self._ffn_stats: tuple[Mapping[str, Tensor], ...] = ()
        self._losses: list[Tensor] = []
        self._configured = False

    def configure_callbacks(self) -> list[Callback]:
        """Bring what every run needs: resumable randomness, hash tables, and metrics."""
        rows = self.part.sparse_memory
        own = [] if rows is None else [SparseMemory(self.model, rows)]
        return [RandomState(), HashTables(), TrainingMetrics(), *own]

    def setup(self, stage: str) -> None:
        """Fit the model to the data's tokenizer, and the data's sequences to the model.

        Raises:
            InputError: the sequences are longer than the model is made for.
        """
        if stage == TrainerFn.FITTING:
            take_whole_steps(self.trainer)
        data = getattr(self.trainer, "datamodule", None)
        length = getattr(data, "sequence_length", 0)
        start.check_length(self.model, length)
        if stage == "fit" and length:
            start.remember_length(self.model, length, fresh=self.initialize_from is None)
        tokenizer = getattr(data, "tokenizer", None)
        if self.initialize_from is not None and tokenizer is not None:
            start.check_tokenizer(self.initialize_from, tokenizer)
        start.remember_ends(self.model, tokenizer)

    def configure_model(self) -> None:
        """Parallelize the model, and compile it if asked to; once."""
        if self._configured:
            return
        self._configured = True
        parallelize_for(self.trainer.strategy, self)
        if self.compile_model:
            self.model.compile()

    def on_fit_start(self) -> None:
        """Forget the half of a step that an earlier run was stopped in."""
        self._losses = []
        for layer in self._learning_layers():
            layer.discard()

    def forward(self, batch: dict[str, Tensor]) -> Any:
        """Run the model on a batch; see :class:`MoezooOutput`."""
        return predict(self.model, batch["input_ids"], batch["labels"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """Compute the loss; hand its parts and the layers' statistics to the callbacks."""
        output = self(batch)
        self._ffn_stats = (*output.ffn_stats, *(output.memory_stats or ()))
        loss, lm_loss = output.loss, output.lm_loss
        if process_count() > 1:
            share = share_of_scored(batch["labels"])
            loss, lm_loss = loss + (share - 1.0) * lm_loss, lm_loss * share
        self._losses.append(loss.detach())
        return {
            "loss": loss,
            "lm_loss": lm_loss.detach(),
            "aux": {name: value.detach() for name, value in output.aux_losses.items()},
            "ffn_stats": output.ffn_stats,
            "memory_stats": output.memory_stats or (),
        }

    def on_after_backward(self) -> None:
        """Pass the micro-batch's statistics to the layers."""
        layers = self._learning_layers()
        for layer, stats in zip(layers, self._ffn_stats if layers else (), strict=True):
            layer.observe(stats)
        self._ffn_stats = ()

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each clip group, unless the step is to be dropped, or to end the run."""
        strategy = self.trainer.strategy
        average_sparse_gradients(self.model, strategy.root_device)
        if isinstance(strategy, ZeROStrategy):
            gradients = strategy.gradients()
        else:
            gradients = clipping.grouped_gradients(optimizer)
        losses, self._losses = torch.stack(self._losses), []
        if len(losses) != self.trainer.accumulate_grad_batches:
            # The last step of an epoch may have fewer, of which each was divided by the full count.
            clipping.scale(gradients, self.trainer.accumulate_grad_batches / len(losses))
        norms = clipping.gradient_norms(gradients, over_ranks=isinstance(strategy, ZeROStrategy))
        self.grad_norm = float(clipping.total_norm(norms))
        apart = {name: norm for name, norm in norms.items() if name != clipping.MAIN}
        self.clip_group_norms = {name: float(norm) for name, norm in apart.items()}
        if not self.guard.allows(self.trainer, losses, self.grad_norm):
            optimizer.zero_grad(set_to_none=True)  # then it leaves parameters and state alone
            return
        if gradient_clip_val and gradient_clip_algorithm == "value":
            clipping.clip_values(gradients, gradient_clip_val)
        elif gradient_clip_val:
            clipping.clip_norms(gradients, norms, gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; what layers learn outside the gradient follows, or is dropped with the step."""
        super().optimizer_step(*args, **kwargs)
        self.guard.settle(self.trainer, self._learning_layers(), self.schedule)

    def _learning_layers(self) -> list[FeedForward]:
        """List the layers that may learn outside the gradient."""
        return [] if self.part.sparse_memory is not None else ffn_layers(self.model)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build optimizer and schedule."""
        # fp16's gradient scaler and the fused kernel would both unscale the gradients.
        fused = not str(self.trainer.precision).startswith("16")
        optimizer = build_optimizer(self.model, self.optimizer_config, fused=fused)
        if any(is_sparse(group) for group in optimizer.param_groups):
            check_sparse_gradients(self.trainer.strategy, self.compile_model)
        if getattr(self.trainer, "fast_dev_run", False):  # the real schedule would not fit
            self.schedule = RunSchedule(ScheduleConfig("constant", warmup_steps=0))
        schedule = self.schedule.put_on(optimizer, run_steps(self.trainer), self.model)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }

    def on_train_start(self) -> None:
        """Take the first step by this run's schedule, not by the checkpoint's."""
        self.schedule.set_rates()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model in the checkpoint, as JSON: nothing in it needs unpickling.

        Raises:
            InputError: model or optimizer hold numbers that are not finite.
        """
        finite.check_checkpoint(checkpoint)
        checkpoint[CONFIG_KEY] = {
            "config": identity.describe(self.model.config),
            "unrelated": identity.unrelated(self.model.config),
            "optimizer": asdict(self.optimizer_config.on(self.device)),
            "schedule": self.schedule.state_dict(checkpoint["global_step"]),
            "guard": self.guard.state_dict(),
            **self.part.describe(self.model),
        }
        if self.part.added:
            checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"])
        if (trainer := attached_trainer(self)) is not None:
            checkpoint[CONFIG_KEY]["precision"] = str(trainer.precision)
            stand_between_batches(checkpoint, trainer)

    def save(self, path: Path, tokenizer: Tokenizer | None) -> None:
        """Write the model as a Hugging Face directory, what was added merged, with a tokenizer.

        Rank 0 writes; all must call this together, as each may hold shards.

        Raises:
            InputError: a tensor is not finite.
        """
        finite.check_model(self.model, self.global_step)
        first = self.global_rank == 0
        whole = full_state_dict(self.model, first) if is_sharded(self.model) else None
        save_model(path, self.model, tokenizer, whole, write=first)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or optimizer before anything is changed.

        Raises:
            InputError: names what differs.
        """
        saved = checkpoint.get(CONFIG_KEY)
        if saved is None:
            raise InputError(
                "ckpt_path: the checkpoint was not written by moezoo fit; name one of checkpoints/"
            )
        with identity.own_names():
            identity.check_model(saved["config"], self.model.config)
        self.part.check_saved(saved, self.model)
        whole, state = full_shape_state_dict(self), checkpoint["state_dict"]
        identity.check_tensors(state, trained_state(self) if self.part.added else whole)
        checkpoint["state_dict"] = {**whole, **state}
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self.optimizer_config = self.optimizer_config.as_begun(saved["optimizer"])
            check_same("optimizer", saved["optimizer"], asdict(self.optimizer_config))
            self.schedule.load_state_dict(saved.get("schedule"), checkpoint["global_step"])
        self.guard.load_state_dict(saved.get("guard", {}))
