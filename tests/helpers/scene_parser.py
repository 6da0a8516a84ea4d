"""Tells whether a caption of the `shapes` dataset is true of its scene, by a grammar of its own.

It knows English words and a scene's geometry, and nothing of how `shapes.py` makes its captions.

    caption  = [opening] noun [clause] [ending]       (an opening, and then no "is")
    clause   = "with" noun relation "it" {"and" noun relation "it"}
             | link {"and" noun link}                 ("is" in all the links or in none)
    link     = ["is"] relation noun [("which" | "that") "is" relation noun]
    noun     = ("a" | "one" | "the") [size] colour shape
    ending   = ["alone"] "on a" ("plain" | "light") "background" | "and nothing else"

"a" and "one" bring a new object in, "the" means one that was named before, "it" the first one.
"""

from typing import NamedTuple

SHAPES = {"circle", "square", "triangle", "star", "cross"}
COLOURS = {"red", "green", "blue", "yellow", "purple", "pink", "black"}
SIZES = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
OPENINGS = ("there is", "the picture shows")
RELATIONS = {
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "left of": "left",
    "to the left of": "left",
    "right of": "right",
    "to the right of": "right",
}
# Unit steps from the second object to the first, y downwards.
DIRECTIONS = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}


class Noun(NamedTuple):
    """An object as a caption names it; `size` is None where it is left unsaid."""

    size: str | None
    colour: str
    shape: str


class Statement(NamedTuple):
    """What a caption says: its objects, and relations as (object, direction, object) indices."""

    objects: list[Noun]
    relations: list[tuple[int, str, int]]


class UngrammaticalError(Exception):
    """The words are not a sentence of the grammar."""


def is_true(caption: str, scene: dict) -> bool:
    """Return whether `caption` names every object of `scene`, no other one, and nothing wrong.

    Each object needs its shape and colour, its size where one is said must be right, every
    relation must hold in the picture, and the relations must tie all the objects together.
    """
    said = parse(caption)
    if said is None or len(said.objects) != len(scene["objects"]):
        return False
    found = [find(noun, scene["objects"]) for noun in said.objects]
    if None in found or len(set(found)) != len(found):
        return False
    things = [scene["objects"][index] for index in found]
    holding = (holds(things[i], direction, things[j]) for i, direction, j in said.relations)
    return all(holding) and tied(len(things), said.relations)


def parse(caption: str) -> Statement | None:
    """Return what `caption` says, or None where it is not a sentence of the grammar."""
    try:
        return Reader(caption.lower().removesuffix(".").split()).caption()
    except UngrammaticalError:
        return None


def find(noun: Noun, things: list[dict]) -> int | None:
    """Return the index of the one thing that `noun` names, None if there is none or several."""
    fits = [
        index
        for index, thing in enumerate(things)
        if (thing["colour"], thing["shape"]) == (noun.colour, noun.shape)
        and noun.size in (None, thing["size"])
    ]
    return fits[0] if len(fits) == 1 else None


def holds(first: dict, direction: str, second: dict) -> bool:
    """Return whether `first` lies clearly in `direction` of `second`: twice as far as sideways."""
    across, down = first["x"] - second["x"], first["y"] - second["y"]
    step_x, step_y = DIRECTIONS[direction]
    along, aside = across * step_x + down * step_y, across * step_y + down * step_x
    return along > 0 and along >= 2 * abs(aside)


def tied(count: int, relations: list[tuple[int, str, int]]) -> bool:
    """Return whether the relations lead from the first of `count` objects to all the others."""
    reached = {0}
    for _ in range(count):
        for i, _direction, j in relations:
            if reached & {i, j}:
                reached |= {i, j}
    return len(reached) == count


class Reader:
    """Reads a caption word by word, from left to right."""

    def __init__(self, words: list[str]):
        self.words, self.at = words, 0
        self.said = Statement([], [])

    def caption(self) -> Statement:
        opened = any(self.take(opening) for opening in OPENINGS)
        first = self.noun()
        if self.take("with"):
            self.company(first)
        elif not self.at_ending():
            self.links(first, finite=not opened and self.take("is"))
        self.ending()
        return self.said

    def company(self, host: int) -> None:
        while True:
            guest = self.noun()
            self.relate(guest, self.relation(), host)
            self.expect("it")
            if self.at_ending() or not self.take("and"):
                return

    def links(self, subject: int, finite: bool) -> None:
        while True:
            place = self.link(subject)
            if self.take("which") or self.take("that"):
                self.expect("is")
                self.link(place)
            if self.at_ending() or not self.take("and"):
                return
            subject = self.noun()
            if finite:
                self.expect("is")

    def link(self, subject: int) -> int:
        direction = self.relation()
        place = self.noun()
        self.relate(subject, direction, place)
        return place

    def relate(self, first: int, direction: str, second: int) -> None:
        if first == second:
            raise UngrammaticalError
        self.said.relations.append((first, direction, second))

    def relation(self) -> str:
        for phrase, direction in RELATIONS.items():
            if self.take(phrase):
                return direction
        raise UngrammaticalError

    def noun(self) -> int:
        article = self.one_of({"a", "one", "the"})
        size = SIZES[self.word()] if self.peek() in SIZES else None
        noun = Noun(size, self.one_of(COLOURS), self.one_of(SHAPES))
        if article == "the":
            return self.named_before(noun)
        self.said.objects.append(noun)
        return len(self.said.objects) - 1

    def named_before(self, noun: Noun) -> int:
        fits = [index for index, old in enumerate(self.said.objects) if old[1:] == noun[1:]]
        if len(fits) != 1:
            raise UngrammaticalError
        old = self.said.objects[fits[0]]
        if None not in (old.size, noun.size) and old.size != noun.size:
            raise UngrammaticalError
        self.said.objects[fits[0]] = old._replace(size=old.size or noun.size)
        return fits[0]

    def at_ending(self) -> bool:
        rest = self.words[self.at :]
        return rest[:1] in ([], ["on"], ["alone"]) or rest[:2] == ["and", "nothing"]

    def ending(self) -> None:
        if self.take("alone") and len(self.said.objects) > 1:
            raise UngrammaticalError
        alone = self.at > 0 and self.words[self.at - 1] == "alone"
        if self.take("on a"):
            self.one_of({"plain", "light"})
            self.expect("background")
        elif alone or not (self.take("and nothing else") or self.peek() is None):
            raise UngrammaticalError
        if self.peek() is not None:
            raise UngrammaticalError

    def peek(self) -> str | None:
        return self.words[self.at] if self.at < len(self.words) else None

    def word(self) -> str:
        self.at += 1
        return self.words[self.at - 1]

    def one_of(self, choices: set[str]) -> str:
        if self.peek() not in choices:
            raise UngrammaticalError
        return self.word()

    def take(self, phrase: str) -> bool:
        size = len(phrase.split())
        if self.words[self.at : self.at + size] != phrase.split():
            return False
        self.at += size
        return True

    def expect(self, phrase: str) -> None:
        if not self.take(phrase):
            raise UngrammaticalError
