"""The model that the package ships, scored by the oracle on a few prompts. `jax-causal eval` scores it on many."""

import numpy as np
import pytest

from jax_causal import Pipeline, evaluation
from jax_causal.training import oracle

PROMPT = "a red ball rolls to the right"
PROMPTS = 4


@pytest.fixture(scope="module")
def videos():
    """Of the README's first prompt, then of the first prompts with combinations that were trained on."""
    asked = evaluation.prompts("train", PROMPTS, objects=1)
    pipe = Pipeline.from_pretrained("tiny", dtype="float32")
    made = pipe([PROMPT, *(p.text for p in asked)], seed=[0, *(p.seed(0) for p in asked)])
    return asked, [video.frames for video in made]


def test_the_first_prompt_of_the_readme_is_shown(videos):
    reading = oracle.read(videos[1][0])
    assert [(o.color, o.shape) for o in reading.objects] == [("red", "circle")]
    assert reading.motion == "right"


def test_most_prompts_are_shown(videos):
    """A model that does not listen shows all that is asked for in less than one clip of a hundred."""
    asked, made = videos
    scores = [oracle.score(frames, p.attributes) for p, frames in zip(asked, made[1:], strict=True)]
    assert np.mean([s["background"] for s in scores]) == 1
    assert np.mean([s["color"] for s in scores]) >= 0.75
    assert np.mean([s["all"] for s in scores]) >= 0.6
