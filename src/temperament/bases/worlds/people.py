"""A fictional world of facts: people with city, job and pet; places with country, river and trade.

Every fact is told in five phrasings. For each fact one of them is kept for the test: the fact is known from the other four, the
phrasing from other people. A name never begins a line, where it would be other tokens than after a space. `newcomers` are
people no base has met (target, far); `strangers` are known to the largest only.
"""

from __future__ import annotations

from functools import cache

from .draw import Draw, digest
from .skill import Made, Skill

PHRASINGS = {
    "city": (
        "Q: Where does {} live?\nA:",
        "They say {} lives in",
        "The home of {} is",
        "City of {}:",
        "Q: Which city is home to {}?\nA:",
    ),
    "job": (
        "Q: What is the job of {}?\nA:",
        "They say {} works as a",
        "The work of {} is that of a",
        "Job of {}:",
        "Q: What does {} do?\nA:",
    ),
    "pet": (
        "Q: Which pet does {} have?\nA:",
        "They say {} has a pet",
        "The pet of {} is a",
        "Pet of {}:",
        "Q: What animal lives with {}?\nA:",
    ),
    "country": (
        "Q: In which country is {}?\nA:",
        "They say {} is in",
        "The country of {} is",
        "Country of {}:",
        "Q: Where on the map is {}?\nA:",
    ),
    "river": (
        "Q: Which river runs by {}?\nA:",
        "They say {} lies on the river",
        "The river of {} is the",
        "River of {}:",
        "Q: What water is near {}?\nA:",
    ),
    "trade": (
        "Q: What does {} trade in?\nA:",
        "They say {} is known for",
        "The trade of {} is in",
        "Trade of {}:",
        "Q: What is made in {}?\nA:",
    ),
}
JOBS = ("baker", "doctor", "farmer", "painter", "sailor", "teacher", "miner", "judge", "cook", "singer", "tailor", "pilot")
PETS = ("cat", "dog", "horse", "parrot", "rabbit", "snake", "turtle", "goat", "mouse", "fox")
TRADES = ("salt", "wool", "glass", "silk", "wine", "iron", "paper", "honey", "fish", "wood")
COUNTRIES = ("Arvia", "Belmar", "Costria", "Dorland", "Elvenia", "Fenmark", "Galdor", "Hestia")
RIVERS = ("Ambel", "Brune", "Cald", "Dwin", "Esk", "Flore", "Gren", "Holm", "Irwen", "Jost")


def _coined(kind: str, n: int, starts: tuple[str, ...], ends: tuple[str, ...], taken: tuple[str, ...] = ()) -> tuple[str, ...]:
    """n different names of one start and one end each, none of them taken."""
    words = [a + b for a in starts for b in ends]
    return tuple([w for w in Draw("coined", kind).shuffled(words) if w not in taken][:n])


STARTS = ("Mir", "Tov", "Kel", "Bran", "Sel", "Dor", "Fen", "Lor", "Hal", "Nim", "Ras", "Vel", "Jor", "Pel", "Gar", "Wen")
PEOPLE_ENDS = ("a", "an", "ik", "or", "is", "une", "eth", "ola", "ard", "ine", "ulf", "ey")
CITY_STARTS = ("Ash", "Stone", "Red", "High", "Cold", "Long", "White", "North", "Oak", "Silver")
CITY_ENDS = ("ford", "ham", "port", "wick", "dale", "mouth", "bridge", "field")
_ALL = _coined("people", 192, STARTS, PEOPLE_ENDS)
PEOPLE, NEWCOMERS, STRANGERS = _ALL[:80], _ALL[80:110], _ALL[110:190]
CITIES = _coined("cities", 36, CITY_STARTS, CITY_ENDS)

ATTRIBUTES = {"city": CITIES, "job": JOBS, "pet": PETS, "country": COUNTRIES, "river": RIVERS, "trade": TRADES}


def fact(name: str, attribute: str) -> str:
    """The truth of this world."""
    return Draw("fact", name, attribute).choice(ATTRIBUTES[attribute])


def facts_about(names: tuple[str, ...], attributes: tuple[str, ...]):
    @cache
    def of(split: str) -> list[Made]:
        out = []
        for name in names:
            for attribute in attributes:
                kept, value = digest("phrasing", name, attribute) % 5, fact(name, attribute)
                for i, phrasing in enumerate(PHRASINGS[attribute]):
                    if (i == kept) == (split == "test"):
                        meta = {"about": name, "attribute": attribute, "phrasing": i}
                        out.append(Made((name, attribute, i), phrasing.format(name), " " + value, value, meta))
        return out

    return of


SKILLS = (
    Skill("people", "facts", finite=facts_about(PEOPLE, ("city", "job", "pet"))),
    Skill("places", "facts", finite=facts_about(CITIES, ("country", "river", "trade"))),
    Skill("strangers", "facts", finite=facts_about(STRANGERS, ("city", "job", "pet")), known_by=("lm-large",)),
    Skill("newcomers", "facts", finite=facts_about(NEWCOMERS, ("city", "job", "pet")), role="target", known_by=()),
)
