"""Word tasks beside the demo's: plurals, opposites, capital letters."""

from __future__ import annotations

from mimic_core.demo.tasks import TASKS, Pair, Task, split

# Common nouns; every third or so does not just take an s.
_PLURALS = """
man men, woman women, child children, foot feet, tooth teeth, mouse mice, goose geese, person people, life lives,
knife knives, wife wives, leaf leaves, wolf wolves, half halves, shelf shelves, thief thieves, loaf loaves,
city cities, country countries, story stories, baby babies, party parties, lady ladies, family families, body bodies,
army armies, enemy enemies, factory factories, company companies, library libraries, box boxes, church churches,
class classes, dish dishes, bus buses, glass glasses, match matches, watch watches, beach beaches, branch branches,
tax taxes, potato potatoes, tomato tomatoes, hero heroes, echo echoes, book books, car cars, dog dogs, cat cats,
house houses, tree trees, river rivers, road roads, school schools, table tables, chair chairs, window windows,
door doors, garden gardens, bird birds, horse horses, king kings, queen queens, letter letters, word words,
number numbers, day days, boy boys, girl girls, key keys, toy toys, phone phones, street streets, mountain mountains,
island islands, flower flowers, apple apples, teacher teachers, student students, doctor doctors, friend friends,
brother brothers, sister sisters, film films, song songs, game games, picture pictures, idea ideas, problem problems
"""
_OPPOSITES = """
hot cold, big small, tall short, fast slow, high low, hard soft, old young, new old, good bad, rich poor, dark light,
heavy light, strong weak, early late, long short, wide narrow, deep shallow, thick thin, clean dirty, wet dry,
full empty, open closed, loud quiet, happy sad, easy difficult, right wrong, true false, first last, near far,
inside outside, up down, left right, top bottom, front back, east west, north south, day night, black white,
love hate, life death, war peace, win lose, buy sell, push pull, give take, come go, start stop, begin end, rise fall,
increase decrease, accept reject, succeed fail, remember forget, arrive depart, laugh cry, live die, enter exit,
teach learn, lend borrow, question answer, friend enemy, king queen, man woman, brother sister, father mother,
husband wife, son daughter, boy girl, alive dead, awake asleep, always never, before after, above below, over under,
safe dangerous, sharp dull, smooth rough, sweet bitter, cheap expensive, public private, male female, positive negative,
major minor, maximum minimum, ancient modern, guilty innocent, brave cowardly, polite rude, present absent,
possible impossible, legal illegal, visible invisible, correct incorrect
"""


def _pairs(text: str) -> list[Pair]:
    found = (tuple(pair.split()) for pair in text.replace("\n", " ").split(","))
    return [(first, second) for first, second in found]


def plurals() -> list[Pair]:
    """Nouns and their plurals, some irregular."""
    return _pairs(_PLURALS)


def opposites() -> list[Pair]:
    """Words and their opposites."""
    return _pairs(_OPPOSITES)


def upper_case() -> list[Pair]:
    """Nouns, in capital letters as the answer."""
    return [(noun, noun.upper()) for noun, _ in plurals()]


WORD_TASKS = {**TASKS, "plural": plurals, "opposite": opposites, "upper-case": upper_case}


def word_task(name: str, samples: int, seed: int, held_out: int | None) -> Task[Pair]:
    """A task's pairs, split at random: no training pair's question is among the held-out."""
    return split(name, WORD_TASKS[name](), samples, f"{name} {seed}", held_out)
