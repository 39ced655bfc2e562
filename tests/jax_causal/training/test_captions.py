"""Captions against an independent reading by keywords, and their variety."""

import itertools
import re

import pytest

from jax_causal.training import captions, world

SHAPES = {"circle": "circle|ball|disc", "square": "square|box", "triangle": "triangle", "star": "star",
          "cross": "cross|plus sign", "ring": "ring|hoop"}  # fmt: skip
COLORS = "red|orange|yellow|green|cyan|blue|purple|pink"
SIZES = {"small": "small|little|tiny", "medium": "medium-sized|mid-sized", "large": "large|big"}
MOTIONS = {  # the first that matches
    "pass": r"pass|past each other", "chase": r"chases|follows|runs after", "collide": r"collides|bumps|hits",
    "circle": r"(orbit|circle|round) each other", "still": r"still|not move|motionless",
    "left": r"from right to left|(?<!from )left(ward)?\b(?! to)", "right": r"from left to right|right(ward)?\b",
    "up": r"up(ward)?\b|bottom to top", "down": r"down(ward)?\b|top to bottom", "bounce": "bounces",
    "orbit": r"orbits|circular|center|middle", "spin": r"spins|rotates|turns", "pulse": r"puls|\bagain\b",
    "grow": r"grows|bigger", "shrink": r"shrinks|smaller", "disappear": r"disappears|vanishes|fades out",
    "appear": r"appears|out of nothing|fades in", "blink": r"blinks|flashes",
}  # fmt: skip


def parse(text):
    """background or None, motion, [(size or None, color, shape)]"""
    text = text.lower().rstrip(".")
    background = re.search(
        r"(?:plain |(?:on|against|front of) a )(\w+)(?: blue)?(?: background| backdrop|$|,)", text
    )
    if background:
        text = text.replace(background[0], " ")
    sizes = "|".join(SIZES.values())
    things = re.findall(rf"\ban? (?:({sizes}) )?({COLORS}) ({'|'.join(SHAPES.values())})", text)
    rest = re.sub(rf"\ban? (?:({sizes}) )?({COLORS}) ({'|'.join(SHAPES.values())})", "", text)
    motion = next(m for m, words in MOTIONS.items() if re.search(words, rest))

    def value(table, word):
        return next((k for k, words in table.items() if word in words.split("|")), None)

    found = [
        (value(SIZES, size) if size else None, color, value(SHAPES, shape)) for size, color, shape in things
    ]
    return background and background[1].replace("grey", "gray"), motion, found


def cases():
    objects = [world.Object(*o) for o in itertools.product(world.COLORS, world.SHAPES, world.SIZES)]
    for i, motion in enumerate(world.MOTIONS * 60):
        count = 2 if motion in world.PAIR_MOTIONS else 1
        chosen = tuple(objects[(i * 7 + 31 * k) % len(objects)] for k in range(count))
        yield i, world.Attributes(list(world.BACKGROUNDS)[i % 6], motion, chosen)


@pytest.mark.parametrize("complete", [False, True])
def test_every_named_attribute_can_be_read_back(complete):
    named = {"background": 0, "size": 0, "all": 0}
    for seed, attributes in cases():
        text = captions.caption(attributes, seed, complete=complete)
        background, motion, found = parse(text)
        assert motion == attributes.motion, text
        assert [f[1:] for f in found] == [(o.color, o.shape) for o in attributes.objects], text
        assert background == attributes.background or (background is None and not complete), text
        assert all(f[0] in (None, o.size) for f, o in zip(found, attributes.objects, strict=True)), text
        named["background"] += background is not None
        named["size"] += found[0][0] is not None
        named["all"] += 1
    assert 0.4 < named["size"] / named["all"] < 0.6
    assert named["background"] == named["all"] or (
        not complete and 0.7 < named["background"] / named["all"] < 0.8
    )


def test_the_first_prompt_of_the_readme_is_a_caption():
    attributes = world.Attributes("white", "right", (world.Object("red", "circle", "small"),))
    assert not world.held_out(attributes)
    texts = {captions.caption(attributes, seed) for seed in range(4000)}
    assert "a red ball rolls to the right" in texts
    assert len(texts) > 1000


def test_captions_are_deterministic():
    attributes = world.Attributes("navy", "orbit", (world.Object("orange", "star", "large"),))
    assert captions.caption(attributes, 5) == captions.caption(attributes, 5)
    assert captions.caption(attributes, 5) != captions.caption(attributes, 6)


def test_words_that_no_caption_has():
    assert captions.unknown_words("A cat chases the red ball; a CAT plays.") == ["cat", "plays"]
    for (motion, color), seed in zip(itertools.product(world.MOTIONS, world.COLORS), itertools.count()):
        things = (world.Object(color, "circle", "small"), world.Object("red", "cross", "large"))
        things = things if motion in world.PAIR_MOTIONS else things[:1]
        for background in world.BACKGROUNDS:
            text = captions.caption(world.Attributes(background, motion, things), seed)
            assert captions.unknown_words(text) == [], text
