"""The tasks of SmolLM2: those of the demo, opposites, French, and sentences."""

from __future__ import annotations

from collections.abc import Iterable

from mimic_core.demo.prompts import Prompt, Prompter
from mimic_core.demo.tasks import TASKS, Pair, Task, split

from .sentences import contractions, dates, places, sentiment

_FRENCH = """
house maison, dog chien, cat chat, tree arbre, book livre, water eau, bread pain, milk lait, wine vin, cheese fromage,
apple pomme, sun soleil, moon lune, star étoile, sky ciel, sea mer, river fleuve, mountain montagne, forest forêt,
flower fleur, bird oiseau, horse cheval, cow vache, fish poisson, king roi, queen reine, man homme, woman femme,
boy garçon, girl fille, child enfant, mother mère, father père, brother frère, sister soeur, friend ami, hand main,
head tête, eye oeil, heart coeur, day jour, night nuit, week semaine, month mois, year an, time temps, world monde,
city ville, street rue, school école, church église, door porte, window fenêtre, table table, chair chaise, bed lit,
kitchen cuisine, garden jardin, car voiture, train train, boat bateau, money argent, work travail, game jeu, word mot,
letter lettre, language langue, question question, answer réponse, life vie, death mort, love amour, war guerre,
peace paix, red rouge, black noir, white blanc, green vert, blue bleu, big grand, small petit, good bon, bad mauvais,
new nouveau, old vieux, young jeune, hot chaud, cold froid, yes oui, no non, today aujourd'hui, tomorrow demain,
winter hiver, summer été, spring printemps, monday lundi, friday vendredi, sunday dimanche, july juillet, august août
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


def french() -> list[Pair]:
    """English words, and the French ones. Words that are the same in both are left out."""
    return [(english, word) for english, word in _pairs(_FRENCH) if english != word]


def opposites() -> list[Pair]:
    """Words and their opposites."""
    return _pairs(_OPPOSITES)


WORD_TASKS = {
    **TASKS,
    "opposite": opposites,
    "french": french,
    "sentiment": sentiment,
    "place": places,
    "contraction": contractions,
    "date": dates,
}


def word_task(name: str, samples: int, seed: int, held_out: int | None) -> Task[Pair]:
    """A task's pairs, split at random: no training pair's question is among the held-out."""
    return split(name, WORD_TASKS[name](), samples, f"{name} {seed}", held_out)


class CapitalsPrompter(Prompter):
    """Asks in capital letters, after demonstrations as they are."""

    def __call__(self, pair: Pair, demonstrations: Iterable[Pair] = ()) -> Prompt:
        """The prompt of one pair."""
        return super().__call__((pair[0].upper(), pair[1]), demonstrations)
