"""Captions of the procedural world: attributes in varied, plain English.

Words vary (ball, disc, circle; moves, slides, glides) and so do order, upper case and the full stop. Background
and size are sometimes left out. What is named is never ambiguous: every word belongs to one attribute value.
"""

from __future__ import annotations

import functools
import random
import re

from jax_causal.training import world

SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium-sized", "mid-sized"),
    "large": ("large", "big"),
}
COLOR_WORDS = {color: (color,) for color in world.COLORS}
BACKGROUND_WORDS = {"gray": ("gray", "grey"), "navy": ("navy", "navy blue")}
BACKGROUND_PHRASES = (
    "on a {} background",
    "against a {} background",
    "in front of a {} background",
    "against plain {}",
    "on a plain {} backdrop",
)
_GOES = ("moves", "slides", "glides", "travels")
_WAYS = {
    "left": ("to the left", "left", "leftward", "from right to left"),
    "right": ("to the right", "right", "rightward", "from left to right"),
    "up": ("up", "upward", "from bottom to top"),
    "down": ("down", "downward", "from top to bottom"),
}
MOTION_PHRASES = {
    "still": ("stays still", "does not move", "stands still", "rests motionless"),
    **{motion: tuple(f"{verb} {way}" for verb in _GOES for way in ways) for motion, ways in _WAYS.items()},
    "bounce": ("bounces around", "bounces off the borders", "bounces off the edges"),
    "orbit": (
        "orbits the center",
        "moves around in a circular path",
        "goes round the center",
        "circles the middle",
    ),
    "spin": ("spins in place", "rotates on the spot", "spins", "rotates", "turns on the spot"),
    "grow": ("grows", "gets bigger", "grows larger", "becomes bigger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "pulse": ("pulses", "pulsates", "grows and shrinks again and again"),
    "appear": ("appears", "comes into view out of nothing", "fades in"),
    "disappear": ("disappears", "vanishes", "fades out"),
    "blink": ("blinks", "flashes on and off", "blinks on and off"),
}
PAIR_PHRASES = {
    "pass": ("{} and {} pass each other", "{} passes {}", "{} and {} move past each other"),
    "chase": ("{} chases {}", "{} follows {}", "{} runs after {}"),
    "collide": ("{} collides with {}", "{} bumps into {}", "{} hits {} and stops"),
    "circle": ("{} and {} orbit each other", "{} and {} circle each other", "{} and {} go round each other"),
}


def _object(rng: random.Random, thing: world.Object, sized: bool) -> str:
    words = [rng.choice(COLOR_WORDS[thing.color]), rng.choice(SHAPE_WORDS[thing.shape])]
    if sized:
        words.insert(0, rng.choice(SIZE_WORDS[thing.size]))
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _clause(rng: random.Random, attributes: world.Attributes, sized: bool) -> str:
    things = [_object(rng, thing, sized) for thing in attributes.objects]
    if len(things) == 2:
        return rng.choice(PAIR_PHRASES[attributes.motion]).format(*things)
    phrases = MOTION_PHRASES[attributes.motion]
    if attributes.motion in _WAYS and attributes.objects[0].shape in world.ROUND:
        phrases += tuple(f"rolls {way}" for way in _WAYS[attributes.motion])
    return f"{things[0]} {rng.choice(phrases)}"


def caption(attributes: world.Attributes, seed: int, *, complete: bool = False) -> str:
    """One caption; the same for the same arguments.

    Colors, shapes and the motion are always named. The background is named three times out of four, or
    always if `complete` (for evaluation, where nothing may be left to chance); sizes are named every other time.
    """
    rng = random.Random(f"caption {seed}")
    text = _clause(rng, attributes, sized=rng.random() < 0.5)
    if rng.random() < 0.75 or complete:
        background = rng.choice(BACKGROUND_WORDS.get(attributes.background, (attributes.background,)))
        phrase = rng.choice(BACKGROUND_PHRASES).format(background)
        text = f"{phrase}, {text}" if rng.random() < 0.3 else f"{text} {phrase}"
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    return text + "." * (rng.random() < 0.4)


def unknown_words(text: str) -> list[str]:
    """The words of `text`, in lower case and in order, that no caption has."""
    return [word for word in dict.fromkeys(_words(text)) if word not in _known()]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


@functools.cache
def _known() -> frozenset[str]:
    words = {**SHAPE_WORDS, **SIZE_WORDS, **COLOR_WORDS, **BACKGROUND_WORDS}.values()
    phrases = (*MOTION_PHRASES.values(), *PAIR_PHRASES.values(), BACKGROUND_PHRASES, world.BACKGROUNDS)
    texts = (text for group in (*words, *phrases) for text in group)
    return frozenset(_words(" ".join(["a an rolls", *texts])))
