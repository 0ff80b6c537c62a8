"""Tables of layers that follow from the training data, its tokenizer, or a trained model.

Roller et al. 2021, arXiv:2106.04426, section 3: ``balanced`` tables want the frequencies of the
tokens, ``clustered`` and ``dispersed`` ones the token embeddings of a baseline. Memories of n-grams
with ``compression`` want classes of tokens that read alike (Cheng et al. 2026, arXiv:2601.07372,
section 2.2), and rows of tokens the training tokens (Tseng & De Sa 2026, arXiv:2601.21461, section
3.2). All are built once, before a run begins, and belong to the model's state from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from moezoo import L3, Engram, HashLayer
from moezoo.errors import InputError
from moezoo_models.checkpoints.directory import read_tensor, read_tokenizer
from moezoo_models.text.classes import token_classes
from moezoo_models.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moezoo_train.trained import TakesHashTables

MOST_TOKENS = 2_000_000
"""Of a text that is cut into words: the most frequent ones are found by then."""

EMBEDDINGS = "model.embed_tokens.weight"
"""Name of the token embeddings in our checkpoints, and in those of Llama and its kin."""


class HashTables(Callback):
    """Build the hash tables that a run from the start waits for.

    A resumed run finds them in its checkpoint, as do weights taken over from elsewhere.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build, if a checkpoint would have been read by now."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._build(trainer, cast("TakesHashTables", pl_module))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build for strategies that read a checkpoint late."""
        self._build(trainer, cast("TakesHashTables", pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As before the sanity check, where there is none."""
        self._build(trainer, cast("TakesHashTables", pl_module))

    def _build(self, trainer: Trainer, module: TakesHashTables) -> None:
        data: Any = getattr(trainer, "datamodule", None)

        def token_counts() -> Tensor:
            if not hasattr(data, "token_counts"):
                raise InputError(
                    "data: it has no token_counts() for the balanced hash tables; add it, or call "
                    "build_table of the layers"
                )
            return cast(Tensor, data.token_counts())

        def embeddings() -> Tensor:
            vocab_size, tokenizer = module.model.config.vocab_size, getattr(data, "tokenizer", None)
            return baseline_embeddings(module.hash_embeddings_from, vocab_size, tokenizer)

        agreed = trainer.strategy.broadcast
        build_hash_tables(module.model, token_counts, embeddings, agreed)
        build_token_classes(module.model, getattr(data, "tokenizer", None), agreed)
        allocate_rows(module.model, token_counts, lambda: first_tokens(data), agreed)


def build_hash_tables(
    model: nn.Module,
    token_counts: Callable[[], Tensor],
    embeddings: Callable[[], Tensor],
    agreed: Callable[[Tensor], Tensor],
) -> None:
    """Build the tables of all hash layers that have none.

    Args:
        model: whose layers.
        token_counts: gives the tokens' frequencies, ``(V,)`` with V the model's vocabulary; called
            only if a layer asks for them, once.
        embeddings: the same for embeddings, ``(V, any)``.
        agreed: gives every process the first one's tensor; k-means may round differently on
            another machine. All processes read and compute, so that a mistake stops them all.

    Raises:
        InputError: from the two functions; or a layer has room for other tokens than those that
            there are embeddings for.
    """
    waiting = [m for m in model.modules() if isinstance(m, HashLayer) and m.missing_input]
    found: dict[str, Tensor] = {}
    for layer in waiting:
        kind = layer.missing_input
        assert kind is not None
        if kind not in found:
            found[kind] = token_counts() if kind == "frequencies" else embeddings()
        source = found[kind]
        room = layer.vocab_size - len(source)
        if kind == "frequencies":
            layer.build_table(
                frequencies=F.pad(source, (0, room))
            )  # what is not there, never occurs
        elif room:
            raise InputError(
                f"model.ffn.vocab_size: the hash layer has room for {layer.vocab_size} tokens, but "
                f"a {layer.hash_function} table wants the model's number; set it to "
                f"{len(source)}"
            )
        else:
            layer.build_table(embeddings=source)
        layer.table.copy_(agreed(layer.table.cpu()))


def build_token_classes(
    model: nn.Module, tokenizer: Tokenizer | None, agreed: Callable[[Tensor], Tensor]
) -> None:
    """Set which tokens read alike, of all memories of n-grams that wait for it.

    Args:
        model: whose layers.
        tokenizer: of the run; None if the data has none.
        agreed: gives every process the first one's tensor.

    Raises:
        InputError: there is no tokenizer, and a memory waits.
    """
    waiting = [m for m in model.modules() if isinstance(m, Engram) and m.missing_input]
    classes: dict[int, Tensor] = {}
    for layer in waiting:
        if tokenizer is None:
            raise InputError(
                "data: it has no tokenizer, which compression wants; add it, call classify of the "
                "layers, or set their compression to false"
            )
        size = layer.vocab_size
        if size not in classes:
            classes[size] = agreed(token_classes(tokenizer, size))
        layer.classify(classes[size])


def allocate_rows(
    model: nn.Module,
    token_counts: Callable[[], Tensor],
    text: Callable[[], tuple[Tensor, int | None]],
    agreed: Callable[[Tensor], Tensor],
) -> None:
    """Set the rows of all tokens, of all L3 that wait for them.

    Args:
        model: whose layers.
        token_counts: gives the tokens' frequencies, ``(V,)`` with V the model's vocabulary; called
            only if a layer asks for them, once.
        text: likewise, tokens of a text and the one that ends a document.
        agreed: gives every process the first one's tensor.

    Raises:
        InputError: from the two functions.
    """
    waiting = [m for m in model.modules() if isinstance(m, L3) and m.missing_input]
    kinds = {layer.missing_input for layer in waiting}
    counts = token_counts() if "frequencies" in kinds else None
    tokens, end = text() if "tokens" in kinds else (None, None)
    for layer in waiting:
        if layer.missing_input == "frequencies" and counts is not None:
            layer.allocate(frequencies=F.pad(counts, (0, layer.vocab_size - len(counts))))
        else:
            layer.allocate(tokens=tokens, end=end)
        layer.starts.copy_(agreed(layer.starts.cpu()))


def first_tokens(data: Any) -> tuple[Tensor, int | None]:
    """Return the first tokens of the training split, ``(any,)``, and the one that ends a document.

    Of several sources there are as many of each, of all together two million at most.

    Args:
        data: a :class:`moezoo_train.data.datamodule.TokenDataModule`.

    Raises:
        InputError: it is another, or streams its text.
    """
    prepared = getattr(data, "all_prepared", None) if not getattr(data, "streams", False) else None
    if prepared is None:
        raise InputError(
            "data: its tokens are not kept, in which rows by words are found; set stream to false, "
            "or call allocate of the layers"
        )
    parts = [each.tokens("train")[: MOST_TOKENS // len(prepared)] for each in prepared]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)), data.tokenizer.eos_id


def baseline_embeddings(
    path: str | None, vocab_size: int, tokenizer: Tokenizer | None = None
) -> Tensor:
    """Read the token embeddings of a trained model, ``(vocab_size, width)``.

    Args:
        path: Hugging Face directory of the model.
        vocab_size: size of the vocabulary that the hash is for.
        tokenizer: its tokenizer, to compare with the trained model's.

    Raises:
        InputError: there is no path, no model at the path, or one with another vocabulary.
    """
    if path is None:
        raise InputError(
            "model.hash_embeddings_from: missing; clustered and dispersed hash tables follow the "
            "embeddings of a trained model, so give its directory"
        )
    try:
        embeddings = read_tensor(path, EMBEDDINGS)
        theirs = read_tokenizer(path)
    except InputError as error:
        problem = str(error).removeprefix("checkpoint: ")
        raise InputError(f"model.hash_embeddings_from: {problem}") from error
    advice = f"prepare the data with its tokenizer: --data.tokenizer {path}"
    if len(embeddings) != vocab_size:
        raise InputError(
            f"model.hash_embeddings_from: {path} has {len(embeddings)} tokens, the data has "
            f"{vocab_size}; {advice}"
        )
    if tokenizer and theirs and tokenizer.fingerprint() != theirs.fingerprint():
        raise InputError(
            f"model.hash_embeddings_from: {path} has another tokenizer than the data; {advice}"
        )
    return embeddings
