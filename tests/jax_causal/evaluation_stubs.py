"""Stand-ins for a trained model: pipelines that show the scene behind a prompt, or behind another one."""

import dataclasses

import numpy as np

from jax_causal import evaluation, evaluation_models
from jax_causal.config import PRESETS
from jax_causal.video import Video

SIZE = 64  # pixels: enough for the oracle, and a third of the work of 96
CONFIG = dataclasses.replace(PRESETS["tiny"], name="stub", height=SIZE, width=SIZE)


class Stub:
    """Renders the truth; with `shift`, that of the prompt so many places further on in its set."""

    def __init__(self, limit, sets=("held-out",), shift=0):
        self.scenes, self.calls = {}, []
        self.config = CONFIG
        for name in sets:
            split, objects = evaluation.SETS[name]
            asked = evaluation.prompts(split, limit, objects)
            for i, prompt in enumerate(asked):
                self.scenes[prompt.text] = asked[(i + shift) % limit]

    def __call__(self, texts, *, seed, num_frames=None):
        self.calls.append((list(texts), list(seed)))
        render = evaluation_models.truth(num_frames or CONFIG.num_frames, SIZE)
        return [Video(f, CONFIG.fps) for f in render([self.scenes[t] for t in texts], seed)]

    def stream(self, text, *, seed, report, num_frames, height, width, image, video):
        self.calls.append((text, seed))
        report("denoise", 0.1)
        report("decode", 0.1)
        yield np.full((num_frames, height, width, 3), seed, np.uint8)
