"""For a model with fewer layers: the text of ``--recover`` for ``moezoo fit``, and its figures.

Windows, passages and tokens are those of the commands in docs/real_models.md, so that what is
trained on and what is held out are the same. ``python healing.py DIR`` writes ``DIR/training.txt``,
the passages that ``--recover`` trains on; with names of models beneath DIR it prints their
perplexities on the held-out ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.checkpoints.directory import read_tokenizer
from moezoo_models.conversion.carve import calibrate
from moezoo_models.conversion.carving import loaded_perplexity
from moezoo_models.conversion.source import open_source

CALIBRATION_TOKENS, HELD_OUT_TOKENS, WINDOW, RECOVERY_TOKENS = 1024, 2048, 128, 4992


def main(folder: Path, *models: str) -> None:
    """Write the text, or measure models."""
    sizes = (CALIBRATION_TOKENS, HELD_OUT_TOKENS, WINDOW, 0, RECOVERY_TOKENS)
    with open_source(folder / "smollm2") as source:
        text = calibrate(source, str(folder / "reference.txt"), *sizes)
        tokenizer = read_tokenizer(source.directory)
    assert tokenizer is not None
    for name in models:
        print(f"{name:<20}{loaded_perplexity(folder / name, text):8.2f}")
    if not models:
        windows = [row[text.skipped :].tolist() for row in text.recovery]
        with atomic_write(folder / "training.txt", "w") as file:
            file.write("".join(tokenizer.decode(window) for window in windows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
