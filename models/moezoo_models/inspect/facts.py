"""Facts to ask a model for: subjects, questions about them, and what answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moezoo.errors import InputError
from moezoo_models.evaluation.answers import encode_question
from moezoo_models.text.rows import field_of, row_of
from moezoo_models.text.tokenizer import Tokenizer

_FIELDS = ("subject", "question", "answer")


@dataclass(frozen=True)
class Question:
    """A question about a subject.

    Attributes:
        subject: whom it is about; its question holds that once.
        question: what a model is to continue.
        answer: the continuation, with the space that begins it.
    """

    subject: str
    question: str
    answer: str

    @property
    def wording(self) -> str:
        """The question with ``{}`` for the subject."""
        return self.question.replace(self.subject, "{}")

    def answered(self, answer: str | None = None) -> tuple[str, str]:
        """Return the question, and the sentence that an answer makes of it, by default its own."""
        return self.question, self.question + (self.answer if answer is None else answer)


Facts = Mapping[str, Mapping[str, Question]]
"""By subject and wording."""


def read_facts(file: str | Path) -> Facts:
    """Read JSON lines with the fields ``subject``, ``question`` and ``answer``.

    Raises:
        InputError: the file cannot be read, a row lacks a field, its question does not hold its
            subject once, or a subject is asked twice in the same words.
    """
    path = Path(file)
    facts: dict[str, dict[str, Question]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"facts: {path} cannot be read: {reason}; give JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        row = row_of(line, place)
        found = Question(*(field_of(row, field, place) for field in _FIELDS))
        if not found.subject or found.question.count(found.subject) != 1 or not found.answer:
            raise InputError(
                f"facts: {place} needs an answer and a question that holds its subject once"
            )
        own = facts.setdefault(found.subject, {})
        if found.wording in own:
            raise InputError(f"facts: {place} asks for {found.subject!r} as an earlier one does")
        own[found.wording] = found
    if not facts:
        raise InputError(f"facts: {path} holds none; give JSON lines with {', '.join(_FIELDS)}")
    return facts


def alike(tokenizer: Tokenizer, one: Mapping[str, Question], other: Mapping[str, Question]) -> bool:
    """Return whether two subjects are asked in the same words, answered otherwise, and as long."""
    if one.keys() != other.keys() or any(one[w].answer == other[w].answer for w in one):
        return False
    return all(
        len(question_tokens(tokenizer, one[w])) == len(question_tokens(tokenizer, other[w]))
        for w in one
    )


def question_tokens(tokenizer: Tokenizer, question: Question) -> list[int]:
    """Return the tokens of a question, behind the token that ends documents."""
    tokens, start = encode_question(tokenizer, *question.answered())
    return tokens[:start]


def pairs_of_subjects(tokenizer: Tokenizer, facts: Facts, number: int) -> list[tuple[str, str]]:
    """Choose ``number`` subjects, the first ones, and for each the next that is :func:`alike`.

    Raises:
        InputError: no two subjects are.
    """
    subjects, pairs = list(facts), []
    for place, subject in enumerate(subjects):
        others: Sequence[str] = subjects[place + 1 :] + subjects[:place]
        for other in others:
            if alike(tokenizer, facts[subject], facts[other]):
                pairs.append((subject, other))
                break
        if len(pairs) == number:
            break
    if not pairs:
        raise InputError(
            "facts: no two subjects are asked in the same words, have other answers and as many "
            "tokens; give more facts"
        )
    return pairs
