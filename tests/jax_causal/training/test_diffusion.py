"""What the diffusion stages share: noise levels, noise, prompts, losses; and the stages' own choices."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import flow, modules, rope, transformer
from jax_causal.text import UMT5Encoder
from jax_causal.training import captions, data, diffusion, optim, world
from jax_causal.training.causal_stage import Options, gapped_frames
from sharding import SequenceParallel
from sharding.hlo import Program
from tests import micro_world, quick

# Noise levels.


def test_times_are_drawn_evenly_from_the_table():
    shift, draws = 3.0, 200_000
    t, sigma = diffusion.draw_times(jax.random.key(0), (draws,), shift)
    u = 1 - np.arange(1000) / 1000
    table = shift * u / (1 + (shift - 1) * u)
    index = np.searchsorted(-table, -np.asarray(sigma, np.float64) - 1e-6)
    np.testing.assert_allclose(sigma, table[index], rtol=1e-6)
    np.testing.assert_allclose(t, 1000 * table[index], rtol=1e-6)
    counts = np.bincount(index, minlength=1000)
    chi_squared = np.square(counts - draws / 1000).sum() / (draws / 1000)
    assert abs(chi_squared - 999) < 5 * np.sqrt(2 * 999)


def test_times_of_scores_are_clipped():
    """Whole videos share one; 1.6 % and less of the table lie outside [20, 980] at shift 5, and move to its ends."""
    t, sigma = diffusion.clipped_times(jax.random.key(0), (100_000, 1), 5.0, 20.0, 980.0)
    assert (t.shape, float(t.min()), float(t.max())) == ((100_000, 1), 20, 980)
    np.testing.assert_allclose(sigma, t / 1000, rtol=1e-6)
    table = np.asarray(flow.timesteps(5.0))
    for end, outside in ((20, table < 20), (980, table > 980)):
        assert np.mean(np.asarray(t) == end) == pytest.approx(outside.mean(), rel=0.2)
    inside = np.asarray(t)[(t > 20) & (t < 980)]
    assert np.isin(inside, table).all()
    stage = micro_world.stage("distill", options={"earliest": 100.0, "latest": 900.0})
    t, sigma = stage.draw_times(jax.random.key(0), 5000)
    assert (t.shape, float(t.min()), float(t.max())) == ((5000, 1), 100, 900)
    np.testing.assert_allclose(sigma, t / 1000, rtol=1e-6)


# Noise and padding.


def test_noise_is_drawn_in_fp32():
    """In bfloat16 there would be 128 different values and none beyond 2.9."""
    setting = micro_world.stage("teacher").setting
    noise = np.asarray(setting.noise(jax.random.key(0), 64, jnp.bfloat16).astype(jnp.float32))
    assert noise.shape == (64, 6, 9, 32)
    assert np.abs(noise).max() > 4
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


@pytest.mark.sp
def test_noise_is_the_same_on_a_mesh():
    parallel = SequenceParallel(8, "ring").for_model(micro_world.model())
    sharded = diffusion.Setting.create(micro_world.model(), parallel)
    alone = micro_world.stage("teacher").setting
    noise, expected = (
        jax.jit(
            lambda key, setting=setting: setting.noise(key, 2, jnp.float32),
            compiler_options=quick.AS_INSTALLED,
        )(jax.random.key(0))
        for setting in (sharded, alone)
    )
    assert noise.shape[2] == 16
    np.testing.assert_array_equal(noise[:, :, :9], expected)
    np.testing.assert_array_equal(noise[:, :, 9:], 0)


def test_token_mean():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(diffusion.token_mean(x, 3), x[:, :, :3].mean(), rtol=1e-5)
    each = diffusion.token_mean(x, 3, each=True)
    np.testing.assert_allclose(each[:, 0, 0, 0], x[:, :, :3].reshape(2, -1).mean(1), rtol=1e-5)
    assert each.shape == (2, 1, 1, 1)


def test_flow_matching_loss():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 2, 3, 5, 4)).astype(np.float32)
    sigma = rng.uniform(size=(2, 3)).astype(np.float32)

    def velocity(x, t):
        level = sigma[:, :, None, None]
        np.testing.assert_allclose(x, (1 - level) * x0 + level * noise, atol=1e-6)
        np.testing.assert_array_equal(t, 1000 * sigma)
        return 2 * x

    level = sigma[:, :, None, None]
    error = 2 * ((1 - level) * x0 + level * noise) - (noise - x0)
    loss = diffusion.flow_matching_loss(velocity, x0, noise, 1000 * sigma, sigma, 4)
    np.testing.assert_allclose(loss, np.square(error[:, :, :4]).mean(), rtol=1e-5)


# Prompts.


def test_prompts_are_dropped_at_the_rate():
    ids = jnp.arange(1, 60_001, dtype=jnp.int32).reshape(20_000, 3)
    null = np.array([7, 0, 0], np.int32)
    out, dropped = diffusion.drop_prompts(jax.random.key(0), ids, 0.1, null)
    assert np.mean(dropped) == pytest.approx(0.1, abs=0.01)
    which = np.asarray(dropped)[:, 0]
    np.testing.assert_array_equal(out[which], np.broadcast_to(null, (which.sum(), 3)))
    np.testing.assert_array_equal(out[~which], ids[~which])


@pytest.mark.slow
def test_dropped_prompts_have_no_labels_and_say_nothing():
    """With all prompts dropped neither wording nor label matters."""
    losses = []
    for scene in (0, 3):
        stage = micro_world.stage("teacher", options={"drop_prompt": 1.0})
        clips = jax.tree.map(lambda x, scene=scene: x[scene : scene + 1], stage.data())
        clips = clips._replace(latents=jnp.zeros_like(clips.latents))
        params = stage.init(jax.random.key(1))["params"]
        _, metrics = stage.loss(params, jax.random.key(0), clips, 2)
        assert metrics["probe_loss"] == 0
        losses.append(metrics["velocity_error"])
    assert losses[0] == losses[1]


def test_the_prompt_that_says_nothing():
    tokenizer = micro_world.stage("teacher").tokenizer
    ids = diffusion.null_prompt(tokenizer)
    assert ids.tolist() == [tokenizer.eos_id] + [tokenizer.pad_id] * (tokenizer.max_length - 1)


BACKGROUND = re.compile(
    r"(?:on|against|in front of) (?:a (?:plain )?)?(?:plain )?(\w+)(?: blue)?(?: background| backdrop|\W|$)",
    re.IGNORECASE,
)


def read_caption(text):
    """What a caption names, by looking for words: (background or None, [(color, shape), ...])."""
    found = [
        m for m in BACKGROUND.finditer(text) if m[1].lower().replace("grey", "gray") in world.BACKGROUNDS
    ]
    background = found[0][1].lower().replace("grey", "gray") if found else None
    if found:
        text = text.replace(found[0][0], " ")
    nouns = {"ball": "circle", "disc": "circle", "box": "square", "plus": "cross", "hoop": "ring"}
    nouns |= {shape: shape for shape in world.SHAPES}
    color, things = None, []
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in world.COLORS:
            color = word
        elif word in nouns and color:
            things.append((color, nouns[word]))
            color = None
    return background, things


def test_labels_are_what_captions_name():
    scenes = jax.jit(lambda key: data.scenes(key, 400, split="all"))(jax.random.key(5))
    attributes = data.attribute_sets(scenes)
    tokenizer = micro_world.stage("teacher").tokenizer
    prompts = data.prompts(attributes, tokenizer, 2)
    unnamed = collections.Counter()
    for i, scene in enumerate(attributes):
        for wording in range(2):
            text = captions.caption(scene, i * 2 + wording)
            np.testing.assert_array_equal(prompts.ids[i, wording], tokenizer(text)[0][0])
            background, things = read_caption(text)
            assert things == [(thing.color, thing.shape) for thing in scene.objects], text
            motion, label, *rest = prompts.labels[i, wording]
            rest, shapes = rest[:4], rest[4:]
            assert {
                c: world.SHAPES[s] for c, s in zip(world.COLORS, shapes, strict=True) if s != data.UNNAMED
            } == (dict(things)), text
            assert world.MOTIONS[motion] == scene.motion
            if background is None:
                assert label == data.UNNAMED, text
            else:
                assert tuple(world.BACKGROUNDS)[label] == background == scene.background, text
            for (color, shape), thing in zip(zip(rest[::2], rest[1::2], strict=True), things, strict=False):
                assert (tuple(world.COLORS)[color], world.SHAPES[shape]) == thing
            assert rest[2 * len(things) :] == [data.UNNAMED] * (4 - 2 * len(things))
            unnamed[background is None] += 1
    assert 0.15 < unnamed[True] / 800 < 0.35


def test_probe_loss():
    rng = np.random.default_rng(0)
    sizes = list(data.LABELS.values())
    context = rng.normal(size=(3, 4, 8)).astype(np.float32)
    context[0, 2:], context[2, 1:] = 0, 0  # padding
    probe = rng.normal(size=(8, sum(sizes))).astype(np.float32)
    labels = np.array([[rng.integers(size) for size in sizes] for _ in range(3)])
    labels[0, 1:] = data.UNNAMED
    labels[2] = data.UNNAMED
    losses = []
    for row in range(3):
        mean = context[row][np.abs(context[row]).sum(-1) > 0].mean(0)
        logits = np.split(mean @ probe, np.cumsum(sizes)[:-1])
        for one, label in zip(logits, labels[row], strict=True):
            if label != data.UNNAMED:
                losses.append(np.log(np.exp(one).sum()) - one[label])
    assert len(losses) == 1 + len(sizes)
    np.testing.assert_allclose(diffusion.probe_loss(context, labels, probe), np.mean(losses), rtol=1e-5)
    assert diffusion.probe_loss(context, np.full_like(labels, data.UNNAMED), probe) == 0


# Networks.


def test_training_starts_with_no_velocity_at_all():
    config = micro_world.model().transformer
    params = diffusion.zero_velocity(micro_world.components()["transformer"])
    setting = micro_world.stage("teacher").setting
    x = setting.noise(jax.random.key(0), 2, jnp.float32)
    network = transformer.bind(config, params)
    text = network.embed_text(jnp.ones((2, 4, config.text_dim)))
    v = network.forward(x, jnp.full((2, 1), 500.0), text, setting.frames, setting.grid, setting.parallel)
    np.testing.assert_array_equal(v, 0)
    stage = micro_world.stage("teacher")
    fresh = dataclasses.replace(stage.config)
    stage = type(stage)(fresh, stage.model, {"vae": micro_world.components()["vae"]}, None)
    started = stage.init(jax.random.key(0))["params"]["transformer"]
    for leaf in jax.tree.leaves((started["head"]["linear"], started["time_projection"])):
        np.testing.assert_array_equal(leaf, 0)


def test_gapped_frames():
    """The first block stays; all others move by the same gap, in a share of cases."""
    head_dim, longest, draws = 16, 5, 4000
    blocks = np.array([0, 0, 1, 1, 2, 2])
    options = Options(longest_gap=longest, gap_share=0.6)
    run = jax.jit(jax.vmap(lambda key: gapped_frames(key, blocks, head_dim, options)))
    factors = np.asarray(run(jax.random.split(jax.random.key(0), draws)))
    possible = [
        np.concatenate([rope.frame_factors(0, 2, head_dim), rope.frame_factors(2 + gap, 4, head_dim)], axis=1)
        for gap in range(longest + 1)
    ]
    distance = np.stack([np.abs(factors - one).max((1, 2, 3)) for one in possible])
    assert (distance.min(0) < 1e-6).all()
    counts = np.bincount(distance.argmin(0), minlength=longest + 1) / draws
    np.testing.assert_allclose(counts, [0.4, *[0.6 / longest] * longest], atol=0.03)
    plain = gapped_frames(jax.random.key(0), blocks, head_dim, Options())
    np.testing.assert_array_equal(plain, rope.frame_factors(0, 6, head_dim))


def test_guidance(monkeypatch):
    """The real score is cond + (g - 1) (cond - uncond) of the teacher; the critic's has none."""
    stage = micro_world.stage("distill", options={"guidance": 4.0, "negative_prompt": "a red ball"})
    state = stage.init(jax.random.key(0))
    state["critic"]["params"] = jax.tree.map(lambda p: 0.9 * p, state["critic"]["params"])
    ids, negative, frozen = stage.data()
    np.testing.assert_array_equal(negative, stage.tokenizer("a red ball")[0][0])
    seen = {}

    def capture(x, real, fake, tokens):
        seen.update(x=x, real=real, fake=fake, tokens=tokens)
        return jnp.float32(0), jnp.float32(0)

    def score(params, x, t, sigma, context):
        out = original(params, x, t, sigma, context)
        which = "critic" if params is not frozen["teacher"] else "teacher"
        calls.append((which, np.asarray(context), np.asarray(out), x, t, sigma))
        return out

    calls, original = [], stage.score
    monkeypatch.setattr(stage, "score", score)
    monkeypatch.setattr(diffusion, "dmd_loss", capture)
    params, critic, keys = (
        state["generator"]["params"],
        state["critic"]["params"],
        jax.random.split(jax.random.key(3)),
    )
    frames = stage.frames(keys[0])
    rollouts = stage.rollouts(params, keys[:1], frames, ids, frozen, 2)
    rollouts = jax.tree.map(lambda x: x[0], rollouts)
    stage.generator_loss(params, critic, keys[1], rollouts, frames, negative, frozen)
    (_, context, cond, *noisy), (_, nothing, uncond, *_), (_, fake_context, fake, *_) = calls
    assert [call[0] for call in calls] == ["teacher", "teacher", "critic"]
    np.testing.assert_allclose(seen["real"], cond + 3 * (cond - uncond), atol=1e-4)
    np.testing.assert_array_equal(seen["fake"], fake)
    np.testing.assert_array_equal(context, fake_context)
    encoder = modules.bind(UMT5Encoder, stage.model.text_encoder, micro_world.components()["text_encoder"])
    expected = encoder(negative[None], (negative != 0)[None])
    np.testing.assert_allclose(nothing, np.broadcast_to(expected, nothing.shape), atol=1e-5)
    # Both see the sample with the same noise, and predict x - sigma v.
    x, t, sigma = noisy
    assert t.shape == (2, 1)
    level = np.asarray(sigma)[:, :, None, None]
    v = stage.velocity(frozen["teacher"], x, t, context)
    np.testing.assert_allclose(cond, x - level * v, atol=1e-5)
    noise = (x - (1 - level) * seen["x"]) / level
    assert abs(float(noise.std()) - 1) < 0.05
    # Without guidance the teacher is asked once.
    calls.clear()
    plain = micro_world.stage("distill", options={"guidance": 1.0})
    monkeypatch.setattr(plain, "score", score)
    plain.generator_loss(params, critic, keys[1], rollouts, frames, negative, frozen)
    np.testing.assert_array_equal(seen["real"], calls[0][2])
    assert len(calls) == 2


@pytest.mark.parametrize("remat", [False, True], ids=["unrolled", "scanned"])
def test_what_an_update_computes_with(remat):
    """Layers are unrolled but where they are computed again, and the stored form is what gradients come back in."""
    params = micro_world.components()["transformer"]
    config = micro_world.config("causal", remat=remat, dtype="bfloat16")
    computed = diffusion.computed(params, config)
    assert transformer.is_unrolled(computed) != remat
    assert {leaf.dtype for leaf in jax.tree.leaves(computed)} == {jnp.dtype("bfloat16")}
    gradient = jax.grad(lambda p: sum(x.sum() for x in jax.tree.leaves(diffusion.computed(p, config))))(
        params
    )
    assert jax.tree.all(jax.tree.map(lambda g, p: g.dtype == p.dtype and (g == 1).all(), gradient, params))


@pytest.mark.slow
def test_gradients_of_layers_computed_again():
    """A scan over layers that keeps little, and unrolled layers that keep all: the same loss and gradient."""

    def outcome(remat):
        stage = micro_world.stage("causal", remat=remat)

        def loss(params, data):
            return stage.loss(params, jax.random.key(9), *data, 2)[0]

        return jax.jit(jax.value_and_grad(loss))(stage.init(jax.random.key(0))["params"], stage.data())

    (loss, gradient), (expected_loss, expected) = outcome(False), outcome(True)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    norm = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected))
    assert norm > 0
    for leaf, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(leaf - right) <= 1e-5 * norm


def test_one_exit_step_in_four():
    """Every step is left at equally often, all blocks and samples together."""
    stage = micro_world.stage("distill")
    keys = jax.random.split(jax.random.key(0), 4000)
    steps = jax.jit(jax.vmap(stage.draw_exit))(keys)
    np.testing.assert_allclose(np.bincount(steps) / 4000, 0.25, atol=0.03)


@functools.cache
def _spelled_out(step):
    """An update of distillation, step by step, each on rollouts of its own, made when they are needed: the critic's,
    then the generator's. Returns {"generator", "critic"}, losses by name, and the exit steps."""
    stage = micro_world.stage("distill", remat=True)
    state, (ids, negative, frozen) = stage.init(jax.random.key(1)), stage.data()
    generator, critic = state["generator"], state["critic"]
    frames_key, key = jax.random.split(jax.random.fold_in(jax.random.key(stage.config.seed), step))
    *critic_keys, generator_keys = jax.random.split(key, (3, 2))
    frames = stage.frames(frames_key)

    @jax.jit
    def rollouts(key):
        made = stage.rollouts(generator["params"], key[None], frames, ids, frozen, 8)
        return jax.tree.map(lambda x: x[0], made)

    critic_gradient = jax.jit(jax.grad(stage.critic_loss, has_aux=True))
    generator_gradient = jax.jit(jax.grad(stage.generator_loss, has_aux=True))
    losses, exits = [], []
    for turn, (roll_key, key) in enumerate(critic_keys):
        made = rollouts(roll_key)
        exits.append(int(made.exit_step))
        grads, metrics = critic_gradient(critic["params"], key, made)
        losses.append(metrics["loss"])
        rate_at = jnp.int32(2 * step + turn)
        critic, _ = optim.step(stage.critic_optimizer, stage.critic_config, critic, grads, rate_at, {})
    roll_key, key = generator_keys
    made = rollouts(roll_key)
    exits.append(int(made.exit_step))
    grads, metrics = generator_gradient(
        generator["params"], critic["params"], key, made, frames, negative, frozen
    )
    generator, _ = optim.step(stage.optimizer, stage.config, generator, grads, jnp.int32(step), {})
    losses = {"loss": metrics["loss"], "critic_loss": np.mean(losses)}
    return {"generator": generator, "critic": critic}, losses, exits


@pytest.mark.parametrize(
    "remat", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["together", "one by one"]
)
def test_an_update_of_distillation(remat):
    """As spelled out, whether rollouts are made together or not. Together, no loop's length is unknown to the host of
    a GPU, which would wait at every turn to hear whether it has ended."""
    step = 3
    expected, losses, exits = _spelled_out(step)
    assert len(set(exits)) > 1
    stage = micro_world.stage("distill", remat=remat)
    state, data = stage.init(jax.random.key(1)), stage.data()
    update = jax.jit(stage.update).lower(state, jnp.int32(step), data).compile()
    loops = [op for op, _ in Program(update.as_text()).walk() if op.opcode == "while"]
    assert any(loop.trips is None for loop in loops) == remat
    new, metrics = update(state, jnp.int32(step), data)
    for name, loss in losses.items():
        assert float(metrics[name]) == pytest.approx(float(loss), rel=1e-5)
    for name in ("generator", "critic"):
        for part in ("mu", "nu"):
            pairs = [jax.tree.leaves(x[name]["optimizer"][part]) for x in (new, expected)]
            largest = max(np.linalg.norm(leaf) for leaf in pairs[1])
            for leaf, right in zip(*pairs, strict=True):
                assert np.linalg.norm(leaf - right) <= 1e-4 * max(np.linalg.norm(right), 1e-2 * largest)


def test_the_average_begins_late():
    """Until `ema_start` it is the weights; from then on it moves by the decay."""
    config = micro_world.config("vae", ema=0.9, ema_start=3, learning_rate=0.1)
    optimizer = optim.optimizer(config)
    params = {"w": jnp.ones((2, 2))}
    state = {"params": params, "optimizer": optimizer.init(params), "ema": {"w": jnp.zeros((2, 2))}}
    for step in range(5):
        before = state
        state, _ = optim.step(optimizer, config, state, {"w": jnp.ones((2, 2))}, jnp.int32(step), {})
        expected = state["params"]["w"]
        if step >= 3:
            expected = 0.9 * before["ema"]["w"] + 0.1 * expected
        np.testing.assert_allclose(state["ema"]["w"], expected, rtol=1e-6)


# What stages need and give.


@pytest.mark.parametrize("name", ["vae", "teacher", "causal", "distill"])
def test_the_form_of_the_data(name):
    """`data_like` says what `data` gives, without computing it."""
    stage = micro_world.stage(name)
    form = jax.tree.map(lambda x: (x.shape, x.dtype), stage.data_like())
    assert form == jax.tree.map(lambda x: (x.shape, x.dtype), stage.data())


@pytest.mark.parametrize(
    ("name", "lacking", "message"),
    [
        ("teacher", "vae", "starts from a model folder with vae, and init_from has no vae"),
        ("causal", "text_encoder", "and init_from has no text_encoder"),
        ("distill", "transformer", "and init_from has no transformer"),
    ],
)
def test_a_start_that_lacks_a_component(name, lacking, message):
    stage = micro_world.stage(name)
    present = {part: value for part, value in micro_world.components().items() if part != lacking}
    with pytest.raises(ValueError, match=message):
        type(stage)(stage.config, stage.model, present)


def test_prompts_from_a_file(tmp_path):
    """Tokenized as the model folder does, which here reads bytes."""
    (tmp_path / "prompts.txt").write_text("a dog\n\n  zwölf Katzen \n", encoding="utf-8")
    model = micro_world.model()
    tokenizer = dataclasses.replace(model.tokenizer, kind="bytes")
    model = dataclasses.replace(model, tokenizer=tokenizer)
    stage = micro_world.stage("distill", options={"prompts": str(tmp_path / "prompts.txt")})
    stage = type(stage)(stage.config, model, micro_world.components(), teacher=stage.teacher)
    ids, negative, _ = stage.data()
    assert ids.shape == (2, 1, 32)
    assert ids[0, 0, :6].tolist() == [*(byte + 3 for byte in b"a dog"), 1]
    assert bytes(int(i) - 3 for i in ids[1, 0] if i > 1).decode() == "zwölf Katzen"
    assert negative[:2].tolist() == [1, 0]
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        stage.data()
