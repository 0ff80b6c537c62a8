"""Tiny stock models with a byte-level BPE, and llama.cpp to run what is made of them."""

import io
import json
import urllib.request
import warnings

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from moezoo_models.checkpoints.directory import quiet
from moezoo_models.text.tokenizer import HuggingFaceTokenizer

WORDS = "the quick brown fox jumps over lazy dogs 1234 times; it's naive, they'll say. "

SIZES = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
}
QWEN_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
GLM = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
    "partial_rotary_factor": 1.0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
}
KINDS = {
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 2.5}},
    "llama, llama3": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e3,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "olmo2": {},
    "olmo2, tied": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**QWEN_MOE, "head_dim": 32, "norm_topk_prob": True},
    "glm4_moe": {**GLM},
    "glm4_moe, no shared expert": {**GLM, "n_shared_experts": 0},
    "glm4_moe, two shared experts": {**GLM, "n_shared_experts": 2, "norm_topk_prob": False},
    "glm4_moe, biases, norms": {**GLM, "attention_bias": True, "use_qk_norm": True},
    "glm4_moe, first layer dense": {**GLM, "first_k_dense_replace": 1},
    "glm4_moe, half rotated": {
        **GLM,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {**GLM["rope_parameters"], "partial_rotary_factor": 0.5},
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 0.7,
        "tie_word_embeddings": True,
    },
    "granitemoe, biases": {"num_local_experts": 4, "attention_bias": True},
}
"""Fields of tiny models, by ``model_type`` and what is special."""


@pytest.fixture(scope="session")
def bpe():
    """Build a byte-level BPE with some merges; its end token has the number 0."""

    def build(pre_tokenizer=None, *, ignore_merges=False, size=160, text=WORDS, ascii=True):
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
        level = tokenizers.pre_tokenizers.ByteLevel
        backend.pre_tokenizer = pre_tokenizer or level(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|end|>"],
            # llama.cpp tells no probabilities of a token that is half a character.
            initial_alphabet=[c for c in level.alphabet() if c in "ĠĊ" or c.isascii() or not ascii],
            show_progress=False,
        )
        backend.train_from_iterator([text] * 3, trainer)
        hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
        return HuggingFaceTokenizer(hf)

    return build


@pytest.fixture
def kinds():
    return KINDS


@pytest.fixture
def pieces():
    """A sentencepiece model such as `moezoo prepare` trains."""
    from moezoo_models.text.tokenizer import SentencePieceTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "Füße und Äpfel, 3.14 café"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        normalization_rule_name="identity",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        bos_id=-1,
        pad_id=-1,
        unk_id=0,
        eos_id=1,
        minloglevel=3,
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture
def stock(bpe, tmp_path):
    """Write a tiny stock model of a kind, each of whose tensors is random, and its tokenizer."""

    def write(kind, folder="model", tokenizer=None, **fields):
        name = kind.partition(",")[0]
        config = transformers.CONFIG_MAPPING[name](**{**SIZES, **KINDS.get(kind, {}), **fields})
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for key, buffer in model.named_buffers():
                if key.endswith("e_score_correction_bias"):
                    buffer.add_(0.2 * torch.randn_like(buffer))
        with quiet():
            model.save_pretrained(tmp_path / folder)
        (tokenizer or bpe()).save(tmp_path / folder)
        return tmp_path / folder, model

    return write


class LlamaCpp:
    """llama.cpp's server in this process: F32 cache, no flash attention, one thread."""

    def __init__(self, xllamacpp, file):
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 4096, 1, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.warmup, parameters.verbosity = False, -1
        f32 = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_k = parameters.cache_type_v = f32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = off
        self._server = xllamacpp.Server(parameters)

    def _post(self, path, **content):
        request = urllib.request.Request(
            self._server.listening_address + path,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def encode(self, text, special=False):
        return self._post("/tokenize", content=text, add_special=special, parse_special=False)[
            "tokens"
        ]

    def greedy(self, prompt, steps, vocabulary):
        """Return greedy tokens, and for each step the log-probability of every token."""
        answer = self._post(
            "/completion",
            prompt=prompt,
            n_predict=steps,
            n_probs=vocabulary,
            temperature=0,
            cache_prompt=False,
            ignore_eos=True,
            return_tokens=True,
        )
        found = []
        for step in answer["completion_probabilities"]:
            row = torch.full((vocabulary,), -torch.inf)
            for each in step["top_logprobs"]:
                row[each["id"]] = each["logprob"]
            found.append(row)
        return answer["tokens"], torch.stack(found)


@pytest.fixture
def llama_cpp():
    """Open a GGUF file in llama.cpp; the test is skipped where that is not installed."""
    xllamacpp = pytest.importorskip("xllamacpp")
    return lambda file: LlamaCpp(xllamacpp, file)
