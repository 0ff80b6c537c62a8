"""What may be accepted although it was changed, and why."""

from __future__ import annotations

import re

HARMLESS: dict[str, str] = {
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
