"""Sentence tasks: sentiment, the place in a sentence, contractions, dates."""

from __future__ import annotations

import random
from calendar import month_name

from mimic_core.demo.tasks import Pair

# What is said of things, each once: nothing that a held-out sentence says was trained on.
_GOOD = """
was worth every penny; made all of us smile; works better than I had hoped; is the best I have seen in years;
kept me awake with joy; was a pleasure from start to end; is exactly what we needed;
looks even better than in the photo;
saved us a lot of time; was a lovely surprise; has never let me down; tasted wonderful; is easy to love;
deserves all the praise it gets; was warm and welcoming; left me speechless with delight; is a real bargain;
went far beyond my hopes; was brilliant; is a gift for the whole family; made my day; is beautifully made;
was fun for everyone; feels solid and well thought out; is a small miracle; got us a great deal; was simply perfect;
is the reason I will come back; brought tears of happiness; was fresh and full of ideas; is a delight to use;
won our hearts; was kind to my budget; runs smoothly every day; is charming; was a triumph; impressed the experts;
is refreshing; turned out superb; was helpful and quick; is an absolute treat; was a dream come true; sparkles;
could not have been nicer; is my new favourite
"""
_BAD = """
was a waste of money; broke on the first day; made everyone angry; is far worse than promised; put me to sleep;
was a nightmare from start to end; is not what we ordered; looks cheap and ugly; cost us a whole day;
was a bitter disappointment; has failed me three times; tasted awful; is hard to bear;
deserves none of the praise it gets;
was cold and rude; left me bored; is a plain fraud; fell far short of my hopes; was dreadful; is useless to everybody;
ruined my day; is badly made; was dull for everyone; feels flimsy and careless; is a total mess; was stolen from us;
was simply terrible; is the reason I will never come back; brought nothing but trouble; was stale and without ideas;
is a pain to use; lost our trust; was a burden on my budget; stops working every day; is annoying; was a failure;
angered the experts; is tiresome; turned out horrible; was slow and unhelpful; is an absolute horror;
was a bad joke; stinks; could not have been worse; is my biggest regret
"""
_THINGS = """
The film; This hotel; Our dinner; The new phone; Her speech; The last season; That restaurant; My old car; The concert;
His second book; The service; This jacket
"""
_PLACES = """
Lisbon Berlin Tokyo Cairo Oslo Madrid Rome Vienna Athens Dublin Prague Warsaw Helsinki Stockholm Lima Bogota Nairobi
Delhi Mumbai Seoul Beijing Shanghai Bangkok Hanoi Manila Jakarta Sydney Melbourne Perth Auckland Toronto Montreal
Vancouver Chicago Boston Seattle Denver Houston Dallas Miami Atlanta Detroit Portland London Manchester Liverpool
Glasgow Edinburgh Belfast Cardiff Paris Lyon Marseille Brussels Antwerp Amsterdam Rotterdam Hamburg Munich Cologne
Zurich Geneva Basel Milan Naples Venice Florence Turin Budapest Bucharest Sofia Belgrade Zagreb Istanbul Ankara Moscow
Kiev Tehran Baghdad Damascus Beirut Jerusalem Lagos Accra Dakar Tunis Algiers Havana Quito Santiago
"""
_PEOPLE = ("Anna", "Peter", "Maria", "John", "Sarah", "David", "Laura", "Tom", "Julia", "Mark", "Emma", "Paul")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_EVENTS = (
    "{person} flew to {place} on {day}.",
    "On {day}, {person} will open a shop in {place}.",
    "{person} left {place} last {day} by train.",
    "The letter that {person} wrote on {day} came from {place}.",
    "It rained in {place} when {person} arrived on {day}.",
    "{person} has lived in {place} since {day}.",
)
_CONTRACTED = (
    *(("I am", "I'm"), ("he is", "he's"), ("she is", "she's"), ("we are", "we're"), ("they are", "they're")),
    *(("you are", "you're"), ("I will", "I'll"), ("we will", "we'll"), ("they will", "they'll"), ("I have", "I've")),
    *(("we do not", "we don't"), ("I do not", "I don't"), ("he does not", "he doesn't"), ("she cannot", "she can't")),
    *(("they cannot", "they can't"), ("we did not", "we didn't"), ("it is", "it's"), ("that is", "that's")),
)
_BE = "at home; very tired; ready to go; from Spain; in the garden; new here; quite sure; late again"
_DO = "know him; like tea; go there; see the house; need help; read the paper; sleep well; want more"
_DONE = "seen it; been there; lost the key; eaten lunch"
_MONTHS = tuple(month_name)[1:]


def _listed(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]


def sentiment() -> list[Pair]:
    """Sentences, and whether they praise."""
    things = _listed(_THINGS)
    said = [(text, answer) for texts, answer in ((_GOOD, "positive"), (_BAD, "negative")) for text in _listed(texts)]
    return [(f"{things[7 * i % len(things)]} {text}", answer) for i, (text, answer) in enumerate(said)]


def places() -> list[Pair]:
    """Sentences with a person, a day and a place, and the place. Each place occurs once."""
    draw = random.Random(0)
    return [
        (draw.choice(_EVENTS).format(person=draw.choice(_PEOPLE), day=draw.choice(_DAYS), place=place), place)
        for place in _PLACES.split()
    ]


def contractions() -> list[Pair]:
    """Formal clauses, and how they are said."""
    found = []
    for formal, casual in _CONTRACTED:
        last = formal.split()[-1]
        ends = _DONE if last == "have" else _BE if last in ("am", "is", "are") else _DO
        found += [(f"{formal} {end}", f"{casual} {end}") for end in _listed(ends)]
    return found


def dates() -> list[Pair]:
    """Dates in words, and as numbers: year, month, day."""
    draw = random.Random(0)
    chosen = draw.sample([(d, m, y) for d in range(1, 29) for m in range(1, 13) for y in range(1950, 2025)], 120)
    return [(f"{d} {_MONTHS[m - 1]} {y}", f"{y}-{m:02}-{d:02}") for d, m, y in chosen]
