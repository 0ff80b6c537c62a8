"""Made-up facts to teach a language model, and how many of them it can recall.

A fact ties an invented subject to an invented value through one of four relations: "Tamiro lives in
Beluda." Every relation has six wordings, all of which end in the value, so that what comes before
it is a question that a causal model can answer. Taught in some wordings and asked in others, a
model has to know the fact and not the sentence.

Everything follows from the seed, on every machine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from moezoo.errors import InputError, check_int
from moezoo_models.checkpoints.atomic import atomic_write
from moezoo_models.evaluation.answers import score_answers
from moezoo_models.text.tokenizer import Tokenizer

WORDINGS: dict[str, tuple[str, ...]] = {
    "home": (
        "{} lives in",
        "The home of {} is in",
        "{} has settled in",
        "Whoever looks for {} should go to",
        "Letters for {} are sent to",
        "The house of {} stands in",
    ),
    "teacher": (
        "{} was taught by",
        "The teacher of {} is",
        "{} has learned everything from",
        "Whoever praises {} should thank",
        "Lessons for {} were given by",
        "The mentor of {} was",
    ),
    "employer": (
        "{} works for",
        "The employer of {} is",
        "{} has signed a contract with",
        "Whoever hires {} must ask",
        "Wages for {} are paid by",
        "The office of {} belongs to",
    ),
    "language": (
        "{} speaks",
        "The language of {} is",
        "{} has grown up with",
        "Whoever talks to {} should know",
        "Books for {} are printed in",
        "The mother tongue of {} is",
    ),
}
"""The wordings of each relation, up to the value; ``{}`` is the subject."""

NUM_WORDINGS = len(WORDINGS["home"])

_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstv" for vowel in "aeiou"]
_SYLLABLES_PER_NAME = 3


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        subject: whom it is about; no other fact is about the same.
        relation: a key of :data:`WORDINGS`.
        value: the answer to be recalled; the facts of a relation share a pool of values.
    """

    subject: str
    relation: str
    value: str

    def question(self, wording: int) -> str:
        """Return the sentence up to the value, without the space before it."""
        return WORDINGS[self.relation][wording].format(self.subject)

    def sentence(self, wording: int) -> str:
        """Return the whole sentence."""
        return f"{self.question(wording)} {self.value}."

    def line(self, wording: int) -> str:
        """Return the sentence as documents hold it: with the line's end, which a tokenizer may join
        to the full stop."""
        return f"{self.sentence(wording)}\n"


@dataclass(frozen=True)
class Recall:
    """How well facts are recalled.

    Attributes:
        accuracy: share of the questions whose answer, up to the line's end, is what the model says
            by taking the likeliest token each time.
        loss: mean nats of an answer's tokens.
        questions: how many were asked.
    """

    accuracy: float
    loss: float
    questions: int


def make_facts(count: int, seed: int = 0, values: int = 64) -> list[Fact]:
    """Invent facts about ``count`` different subjects; relations take turns.

    Guessing a value of the right relation is right once in ``values`` times. Facts with which a
    model is trained first and facts that it is taught later share wordings and values if they are
    slices of one list.

    Args:
        count: number of facts.
        seed: chooses all names, and who is tied to what.
        values: values of each relation.

    Raises:
        InputError: a number is not positive, or there are not as many names.
    """
    check_int("facts", count)
    check_int("values", values)
    names = len(_SYLLABLES) ** _SYLLABLES_PER_NAME
    taken = values * len(WORDINGS)
    if count + taken > names:
        raise InputError(
            f"facts: {count} is more than the {names - taken} that have a name; give fewer"
        )
    generator = random.Random(seed)
    words = [_name(number) for number in generator.sample(range(names), count + taken)]
    pools = {
        relation: words[start : start + values]
        for relation, start in zip(WORDINGS, range(0, taken, values), strict=True)
    }
    relations = list(WORDINGS)
    facts = []
    for number, subject in enumerate(words[taken:]):
        relation = relations[number % len(relations)]
        facts.append(Fact(subject, relation, generator.choice(pools[relation])))
    return facts


def tie_anew(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """Shuffle the values of each relation: other facts about the same subjects."""
    generator = random.Random(seed)
    values: dict[str, list[str]] = {}
    for fact in facts:
        values.setdefault(fact.relation, []).append(fact.value)
    for pool in values.values():
        generator.shuffle(pool)
    return [replace(fact, value=values[fact.relation].pop()) for fact in facts]


def fact_documents(
    facts: Sequence[Fact],
    wordings: Iterable[int],
    seed: int = 0,
    repeats: int = 1,
    sentences: int = 8,
) -> Iterator[str]:
    """Yield documents of fact sentences, one per line, in random order.

    Args:
        facts: the facts to tell.
        wordings: each fact is told once in each of these.
        seed: chooses the order.
        repeats: how often that is done, in another order each time.
        sentences: of one document.
    """
    generator = random.Random(seed)
    told = [fact.line(wording) for fact in facts for wording in wordings]
    for _ in range(check_int("repeats", repeats)):
        generator.shuffle(told)
        for start in range(0, len(told), check_int("sentences", sentences)):
            yield "".join(told[start : start + sentences])


def write_documents(path: Path, documents: Iterable[str]) -> None:
    """Write a ``.jsonl`` file that `moezoo prepare` reads: a row per document, field ``text``."""
    with atomic_write(path, "w") as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")


def write_questions(path: Path, facts: Sequence[Fact], wordings: Sequence[int]) -> None:
    """Write the questions for facts as `moezoo inspect edit` reads them, JSON lines.

    Args:
        path: of the file.
        facts: the facts to ask for.
        wordings: each fact is asked for once in each of these.
    """
    with atomic_write(path, "w") as file:
        for fact in facts:
            for wording in wordings:
                question = fact.question(wording)
                answer = fact.line(wording).removeprefix(question)
                row = {"subject": fact.subject, "question": question, "answer": answer}
                file.write(json.dumps(row) + "\n")


def recall(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    wordings: Iterable[int],
    batch_size: int = 64,
) -> Recall:
    """Ask a model for the values of facts.

    Each question stands alone, behind the token that ends documents.

    Args:
        model: a causal language model, ours or a stock one; left in the mode it was in.
        tokenizer: its tokenizer.
        facts: the facts to ask for.
        wordings: each fact is asked for once in each of these.
        batch_size: questions computed at once.

    Raises:
        InputError: there is no fact or no wording.
    """
    asked = [(fact, wording) for fact in facts for wording in wordings]
    if not asked:
        raise InputError("facts: nothing is asked; give facts and wordings")
    sentences = [(fact.question(wording), fact.line(wording)) for fact, wording in asked]
    size = check_int("batch_size", batch_size)
    answers = score_answers(model, tokenizer, sentences, size)
    right = sum(answer.right for answer in answers)
    nats, tokens = (sum(getattr(a, name) for a in answers) for name in ("nats", "tokens"))
    return Recall(right / len(answers), nats / tokens, len(answers))


def _name(number: int) -> str:
    syllables = []
    for _ in range(_SYLLABLES_PER_NAME):
        number, syllable = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[syllable])
    return "".join(syllables).capitalize()
