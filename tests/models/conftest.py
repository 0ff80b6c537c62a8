"""Toy layers, a small model and a byte tokenizer that the model tests share."""

import pytest
import tokenizers
import torch
import transformers
from torch import nn

import moezoo.feed_forward
from moezoo import FeedForward, FeedForwardOutput
from moezoo_models import MoezooConfig, MoezooForCausalLM
from moezoo_models.checkpoints.directory import quiet, save_checkpoint
from moezoo_models.files.checksums import seal
from moezoo_models.text.tokenizer import HuggingFaceTokenizer, Tokenizer


class TokenRouted(FeedForward):
    """Scales each token by an entry of a table that the token's id chooses.

    It has what strains a model most: token ids, a mask, a loss, statistics, buffers that are saved
    and buffers that are not.
    """

    needs_token_ids = True

    def __init__(self, d_model: int, table_size: int = 7, coefficient: float = 0.5) -> None:
        super().__init__(d_model)
        self.table_size, self.coefficient = table_size, coefficient
        self.weight = nn.Parameter(torch.empty(table_size, d_model))
        self.register_buffer("table", torch.empty(64, dtype=torch.long))
        self.register_buffer("ramp", torch.empty(d_model), persistent=False)
        self.reset_parameters()

    def reset_parameters(self, num_layers: int = 1) -> None:
        with torch.no_grad():
            self.weight.normal_(std=num_layers**-0.5)
            self.table.copy_(torch.randint(self.table_size, (64,)))
            self.ramp.copy_(torch.linspace(0.5, 1.5, self.d_model))

    def forward(self, hidden, *, token_ids=None, router_input=None, mask=None):
        assert token_ids.shape == hidden.shape[:-1]
        rows = self.weight[self.table[token_ids % 64]] * self.ramp
        real = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
        assert real.shape == token_ids.shape
        loss = self.coefficient * (hidden.float().square().mean(-1) * real).sum() / real.sum()
        counts = torch.bincount((token_ids % 64)[real], minlength=64)
        stats = {"tokens": real.sum(), "token_counts": counts}
        return FeedForwardOutput(hidden * rows * real.unsqueeze(-1), {"size": loss}, stats)


class LooksAhead(FeedForward):
    """Not causal: every token gets the mean of all."""

    causal = False

    def reset_parameters(self, num_layers: int = 1) -> None:
        pass

    def forward(self, hidden, *, token_ids=None, router_input=None, mask=None):
        return FeedForwardOutput(hidden.mean(-2, keepdim=True).expand_as(hidden), {}, {})


class ByteTokenizer(Tokenizer):
    """Ids 0 … 255 are bytes, 256 ends texts."""

    vocab_size = 257
    bos_id = None
    eos_id = 256

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256 and i != self.eos_id).decode(
            "utf-8", errors="replace"
        )

    def save(self, directory):
        raise NotImplementedError

    def fingerprint(self):
        return "bytes"


@pytest.fixture(autouse=True)
def _toy_layers(monkeypatch):
    """Register the toys for one test only: other tests go through the whole zoo."""
    for layer in (TokenRouted, LooksAhead):
        monkeypatch.setitem(moezoo.feed_forward._LAYERS, layer.__name__, layer)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models this small only lose by a second thread, the more so on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def byte_tokenizer():
    return ByteTokenizer()


@pytest.fixture
def byte_level_tokenizer():
    """A Hugging Face tokenizer whose tokens are single bytes, with files to save."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    return HuggingFaceTokenizer(hf)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def rule(class_path: str, layers="all", **arguments):
    return {"layers": layers, "class_path": f"moezoo.{class_path}", "init_args": arguments}


MIXED = [rule("DenseFFN", d_ff=48), rule("TokenRouted", 1)]
"""Dense blocks around one that routes on token ids."""

MOE = [rule("SparseMoE", num_experts=4, top_k=2, d_expert=16)]

PERSISTENT = [rule("PersistentMemoryAttention", num_slots=12), rule("DenseFFN", 1, d_ff=48)]
"""Blocks of attention alone around an ordinary one."""


@pytest.fixture
def make():
    """Build a small model with given fields; weights are drawn from the seed 0."""

    def build(**fields) -> MoezooForCausalLM:
        torch.manual_seed(0)
        return MoezooForCausalLM(MoezooConfig(**{**SIZES, **fields}))

    return build


@pytest.fixture
def rules():
    """The rules above by name, for test files, which cannot import this one."""
    return {"mixed": MIXED, "moe": MOE, "persistent": PERSISTENT, "rule": rule}


@pytest.fixture
def ids():
    return torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 200)
    return tmp_path


@pytest.fixture
def ours(make, rules, place, byte_level_tokenizer):
    """A dense model of this library, with a tokenizer."""
    model = make(vocab_size=300, ffn=[rules["rule"]("DenseFFN", d_ff=48)])
    return save_checkpoint(place / "model", model, byte_level_tokenizer)


@pytest.fixture
def llama(place, byte_level_tokenizer):
    """A Llama of stock transformers, sealed, with a tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=300, intermediate_size=48, max_position_embeddings=64
    )
    with quiet():
        transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    byte_level_tokenizer.save(place / "model")
    seal(place / "model" / "model.safetensors")
    return place / "model"
