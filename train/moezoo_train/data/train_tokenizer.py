"""Train a byte-pair-encoding tokenizer (Sennrich et al. 2016, arXiv:1508.07909).

Sentencepiece learns the merges; the result is written both as ``tokenizer.model`` and as a
``tokenizer.json`` with the same ids, which the project itself reads. Nothing is normalised, spaces
and newlines are ordinary characters and what the vocabulary lacks is spelled in bytes: decoding
gives back every text unchanged.
"""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from moezoo.errors import InputError, check_int
from moezoo_models.text.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer

EOS_PIECE = "<|endoftext|>"
UNK_PIECE = "<unk>"
SAMPLE_BYTES = 3_000_000
"""Text the merges are learned from; more changes the compression by less than a percent."""
SCAN_BYTES = 512_000_000
"""Text at the head of the corpus that the sample is drawn from."""
CHUNK_CHARACTERS = 2_000
"""Length of the multi-line stretches the sample consists of.

Sentencepiece never merges across two of its "sentences"; were these lines, no token could hold a
newline.
"""

_BYTE_PIECES = 256
# NUL makes sentencepiece skip the whole chunk, and so does ▅, its mark for unknown characters.
# ▁ would be taken for a space.
_UNTRAINABLE = str.maketrans({"\0": " ", "\u2581": " ", "\u2585": " "})


def train_tokenizer(
    documents: Iterable[str],
    directory: str | Path,
    vocab_size: int = 2048,
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Train a lossless BPE tokenizer and write it to ``directory``.

    The same documents give the same files, byte for byte.

    Args:
        documents: the corpus; it is read once, up to ``SCAN_BYTES``.
        directory: where ``tokenizer.json``, ``tokenizer_config.json`` and ``tokenizer.model`` go.
        vocab_size: number of ids, with 256 bytes and two special tokens among them.
        sample_bytes: how much of the corpus to learn from.

    Raises:
        InputError: the corpus has too little text for ``vocab_size``, or too many distinct
            characters.
    """
    check_int("vocab_size", vocab_size, minimum=_BYTE_PIECES + 3)
    sample = [chunk.translate(_UNTRAINABLE) for chunk in sample_chunks(documents, sample_bytes)]
    model = _train_sentencepiece(sample, vocab_size)
    HuggingFaceTokenizer(_as_hugging_face(model), sentencepiece_model=model).save(directory)
    return load_tokenizer(directory)


def sample_chunks(documents: Iterable[str], sample_bytes: int) -> list[str]:
    """Draw about ``sample_bytes`` of chunks evenly from a stream of unknown length.

    Every chunk gets a pseudo-random key from its content and place; those with the smallest keys
    are kept, in the order of the corpus.
    """
    kept: list[tuple[int, int, str, int]] = []  # (-key, place, chunk, bytes): a max-heap of keys
    kept_bytes = scanned_bytes = place = 0
    for document in documents:
        for chunk in split_text(document, CHUNK_CHARACTERS):
            encoded = chunk.encode()
            digest = blake2b(encoded, digest_size=8, key=place.to_bytes(8, "little")).digest()
            heapq.heappush(kept, (-int.from_bytes(digest, "little"), place, chunk, len(encoded)))
            kept_bytes += len(encoded)
            while len(kept) > 1 and kept_bytes - kept[0][3] >= sample_bytes:
                kept_bytes -= heapq.heappop(kept)[3]
            place += 1
            scanned_bytes += len(encoded)
        if scanned_bytes >= SCAN_BYTES:
            break
    return [chunk for _, _, chunk, _ in sorted(kept, key=lambda entry: entry[1])]


def split_text(text: str, characters: int) -> Iterator[str]:
    """Cut ``text`` into pieces of at most ``characters``, behind a newline if there is one."""
    start = 0
    while len(text) - start > characters:
        newline = text.rfind("\n", start, start + characters)
        end = newline + 1 if newline >= start else start + characters
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _train_sentencepiece(sample: list[str], vocab_size: int) -> bytes:
    try:
        import sentencepiece
    except ImportError as error:
        raise InputError(
            "tokenizer: training one needs `pip install sentencepiece`; or give an existing one"
        ) from error
    if not sample:
        raise InputError("source: it holds no text to train a tokenizer on; name another")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=8 * CHUNK_CHARACTERS,
            unk_id=0,
            unk_piece=UNK_PIECE,
            eos_id=1,
            eos_piece=EOS_PIECE,
            bos_id=-1,
            pad_id=-1,
            num_threads=4,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise InputError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size: the text yields only {match[1]} tokens, not {vocab_size}; "
            f"give a value ≤ {match[1]} or more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size: {vocab_size} is too small for the characters of this text; "
            f"give a value ≥ {match[1]}"
        )
    return f"vocab_size: sentencepiece could not train {vocab_size} tokens: {message}"


def _as_hugging_face(model: bytes) -> Any:
    """Convert the model so that transformers gives the same ids.

    Sentencepiece writes a space as ``▁`` and merges any two neighbours that spell a piece, pieces
    in the order of their ids. Here the pieces hold real spaces, so that ``▁`` itself stays
    distinct, and each piece has one merge rule per way to halve it.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    processor = SentencePieceProcessor(model_proto=model)
    learned: dict[str, int] = {}
    special: dict[str, int] = {}
    for index in range(processor.get_piece_size()):
        piece = processor.id_to_piece(index)
        if processor.is_byte(index) or processor.is_control(index) or processor.is_unknown(index):
            special[piece] = index
        else:
            learned[piece.replace("\u2581", " ")] = index
    merges = [
        (piece[:cut], piece[cut:])
        for piece in learned
        for cut in range(1, len(piece))
        if piece[:cut] in learned and piece[cut:] in learned
    ]
    backend = Backend(
        models.BPE({**special, **learned}, merges, byte_fallback=True, unk_token=UNK_PIECE)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([UNK_PIECE, EOS_PIECE])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=UNK_PIECE,
        eos_token=EOS_PIECE,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
