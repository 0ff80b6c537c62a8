"""What may be accepted although it was changed, and why."""

from __future__ import annotations

import re

# What cannot be left out, as no default of it could be meant.
_SIZES = "model_type|hidden_size|intermediate_size|vocab_size|num_hidden_layers|num_attention_heads"

HARMLESS: dict[str, str] = {
    # Model directories: weights.
    r"(llama|mixtral) \w+ model-\S+\.safetensors byte \d+ is flipped": (
        "weights that other programs wrote have no checksum, and another number is a number"
    ),
    r"(own|llama|mixtral) \w+ model\S*\.safetensors __metadata__(\.\S+)?: .*": (
        "it names the program that wrote the file, and tensors are the same without a checksum"
    ),
    r"(llama|mixtral) \w+ model\.safetensors\.index\.json weight_map\.\S+: dropped": (
        "which tensors there are is read from the headers of the files that are left"
    ),
    r"(llama|mixtral) \w+ model\.safetensors\.index\.json metadata\b.*": "sizes are not read there",
    # Model directories: configuration.
    rf"(own|llama|mixtral) \w+ config\.json (?!{_SIZES}:)\S+: dropped": "the default holds",
    rf"(llama|mixtral) \w+ config\.json (?!{_SIZES}:)\S+: renamed": (
        "the default holds, and other versions' fields may be there"
    ),
    r"(own|llama|mixtral) \w+ config\.json (architectures|dtype|head_dim|layer_types|"
    r"num_key_value_heads|rope_parameters|sliding_window|(pad|bos|eos)_token_id): null": (
        "null is the default"
    ),
    r"(own|llama|mixtral) \w+ config\.json (rope_parameters|ffn\.0\.init_args\.\w+): object": (
        "their defaults hold"
    ),
    r"(own|llama|mixtral) \w+ config\.json (architectures(\.0)?|transformers_version): "
    r"(text|long)": ("the class follows from model_type, and the version is for people"),
    r"(own|llama|mixtral) \w+ config\.json initializer_range: (zero|fraction)": (
        "no weights are drawn"
    ),
    r"(own|llama|mixtral) \w+ config\.json (rms_norm_eps|attention_dropout|router_jitter_noise|"
    r"router_aux_loss_coef): (zero|fraction)": "another number may be asked for",
    r"(own|llama|mixtral) \w+ config\.json (pad|bos|eos)_token_id: (minus|zero|list)": (
        "other tokens, or none, may be meant"
    ),
    r"(own|llama|mixtral) \w+ generation_config\.json (transformers_version|"
    r"_from_model_config): .*": ("they say where the file comes from"),
    r"(own|llama|mixtral) \w+ generation_config\.json output_\w+: (true|null)": (
        "nothing is put out beside the text, and they are written back"
    ),
    r"(own|llama|mixtral) \w+ generation_config\.json use_cache: (true|null)": (
        "the cache changes no numbers"
    ),
    r"(own|llama|mixtral) \w+ generation_config\.json eos_token_id: (null|list|minus|zero)": (
        "other tokens, or none, may end a text"
    ),
    r"(own|llama|mixtral) \w+ generation_config\.json \S+: (dropped|renamed)": "the default holds",
    r"(own|llama|mixtral) \w+ generation_config\.json is missing": "the defaults hold",
    r"(own|llama|mixtral) \w+ generation_config\.json byte \d+ is flipped": (
        "it has no checksum: another name of a setting, of which the default holds"
    ),
    # Model directories: tokenizers.
    r"llama upcycle tokenizer\S* .*": "no text is read, and the files are copied as they are",
    r"(own|llama|mixtral) \w+ tokenizer\.model .*": (
        "tokenizer.json is read, and this one with the same ids is passed on"
    ),
    r"(own|llama|mixtral) \w+ tokenizer_config\.json (backend|clean_up_tokenization_spaces|"
    r"model_max_length|split_special_tokens): .*": (
        "texts are neither cut nor cleaned up, and no special token is read from them"
    ),
    r"(own|llama|mixtral) \w+ tokenizer_config\.json tokenizer_class: .*": (
        "tokenizer.json is read the same by every class that takes it"
    ),
    r"(own|llama|mixtral) \w+ tokenizer_config\.json unk_token: (null|dropped|renamed)": (
        "bytes stand for characters that are not known"
    ),
    r"own usage tokenizer_config\.json eos_token: .*": "no end is put behind a single text",
    r"(own|llama|mixtral) \w+ tokenizer(_config)?\.json byte \d+ is flipped": (
        "a tokenizer has no checksum: it is another one"
    ),
    r"(own|llama|mixtral) \w+ tokenizer\.json (version|normalizer|pre_tokenizer|truncation|"
    r"padding): (dropped|renamed|null)": "null is the default",
    r"(own|llama|mixtral) \w+ tokenizer\.json post_processor\b.*": (
        "it would add special tokens, which is not asked for"
    ),
    r"(own|llama|mixtral) \w+ tokenizer\.json model\.(dropout|unk_token|fuse_unk|byte_fallback|"
    r"ignore_merges|continuing_subword_prefix|end_of_word_suffix): .*": (
        "spelling that a tokenizer may ask for, and nothing says what it was"
    ),
    r"(own|llama|mixtral) \w+ tokenizer\.json decoder\b.*: (null|dropped|renamed)": (
        "tokens are read as the vocabulary spells them"
    ),
    # Training checkpoints.
    r"(ckpt|sharded) export \S+\.ckpt (callbacks|loops|lr_schedulers|epoch|global_step|"
    r"optimizer_states|TokenDataModule|moezoo\.(optimizer|guard|sparse_memory))\b.*": (
        "an export takes tensors and configuration; resuming reads this, and checks it"
    ),
    r"(ckpt|sharded) validate \S+\.ckpt (callbacks|lr_schedulers|optimizer_states|epoch|"
    r"global_step|TokenDataModule|moezoo\.(optimizer|unrelated)|"
    r"loops\.(fit|test|predict)_loop)\b.*": (
        "measuring takes the weights; resuming reads this, and checks it"
    ),
    r"(ckpt|sharded) fit \S+\.ckpt optimizer_states\.0\.state\.\d+: (dropped|object)": (
        "a parameter without a state is one that had no gradient so far"
    ),
    r"(ckpt|sharded) fit \S+\.ckpt (moezoo\.unrelated|loops\.(validate|test|predict)_loop|"
    r"loops\.fit_loop\.state_dict)\b.*": "what nothing is restored from in a run",
    r"(ckpt|sharded) fit \S+\.ckpt TokenDataModule\.\S+: .*": (
        "the order of the batches is compared only, and a warning says that it is another"
    ),
    r"(ckpt|sharded) export \S+\.ckpt moezoo\.unrelated\.(initializer_range|use_cache)\b.*": (
        "no weights are drawn, and the cache changes no numbers"
    ),
    # Prepared data.
    r"data prepare .*": "what is damaged is prepared again, and ends in the same bytes",
    # Text.
    r"(jsonl|parquet|txt) prepare \S+ byte .*": "text has no checksum: it is another text",
    r"txt prepare rows.txt (is half|lacks its last bytes)": "less text is a text",
    r"(jsonl|txt) prepare \S+ has a BOM": "the mark is taken off",
    r"jsonl prepare rows.jsonl id: .*": "of a row its text is read",
    r"jsonl prepare rows.jsonl text: (text|null)": "another text, and none",
    # Settings.
    r"recipe fit settings.yaml (model|data|trainer)(\.\w+)?: object": "their defaults hold",
    r"recipe fit settings.yaml loggers: list": "metrics.csv is always written, and no more",
    r"options prepare settings.yaml output: text": "any name may be asked for",
    r"comparison compare settings.yaml claims\.one\.\w+: date": "a date without quotes is text",
    r"(recipe|options|comparison) \w+ settings.yaml \S+: dropped": "the default holds",
    r"options prepare settings.yaml text_field: .*": "documents of text files have no fields",
    r"options prepare settings.yaml (max_bytes: null|val_fraction: (zero|fraction))": (
        "all of the text, and other shares held out, may be asked for"
    ),
    r"recipe fit settings.yaml trainer.(limit_val_batches|log_every_n_steps|val_check_interval): "
    r"(null|zero|fraction)": "all or some of the validation, at other steps, may be asked for",
    r"(recipe|options|comparison) \w+ settings.yaml has a BOM": "the mark is taken off",
}
"""Reasons by a pattern of artefact, command and mutation."""


def reason(case: str) -> str | None:
    """Return why a case is harmless; None if it is not."""
    return next((why for pattern, why in HARMLESS.items() if re.fullmatch(pattern, case)), None)
