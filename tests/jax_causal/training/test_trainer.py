"""The training loop: exact resume whatever ended a run, and what it says about input that it cannot use."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal import checkpoint, modules
from jax_causal.config import ModelConfig, preset
from jax_causal.text import UMT5Encoder
from jax_causal.training import checkpoints, trainer
from jax_causal.training.folder import Components, placed
from jax_causal.training.metrics import MetricsLog
from jax_causal.training.stage import init_key, step_key
from jax_causal.training.trainer import NotFinite, train
from sharding import SequenceParallel
from tests import toy_stage
from tests.toy_stage import ToyStage, config

ROOT = Path(__file__).parents[3]


def run(folder, settings=None, stage=ToyStage, **options):
    settings = settings or config()
    return train(stage(settings), settings, folder, **options)


def final_state(folder, settings=None):
    """Of the last checkpoint: (updates done, state as numpy arrays)."""
    settings = settings or config()
    abstract = placed(jax.eval_shape(ToyStage(settings).init, jax.random.key(0)), ToyStage(settings).parallel)
    path = checkpoints.latest(folder / "training")
    step, state, _ = checkpoints.restore(path, abstract, settings, allow_changes=True)
    return step, jax.tree.map(np.asarray, state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def metrics(folder):
    """Lines of the metrics file, without the time."""
    lines = (folder / "training" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "elapsed_s"} for line in lines]


def contents(folder):
    return sorted(os.listdir(folder / "training"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder).finished
    return folder


class Stops(ToyStage):
    """Sends itself a signal while sampling."""

    number = signal.SIGTERM

    def sample(self, state):
        os.kill(os.getpid(), self.number)
        return super().sample(state)


def test_it_learns(whole):
    """The error falls to the variance of the noise, 0.01, from that of unrelated weights."""
    settings = config(
        num_steps=1500, checkpoint_every=0, learning_rate=0.05, schedule="cosine", weight_decay=0
    )
    folder = whole.parent / "learned"
    run(folder, settings)
    losses = [line["loss"] for line in metrics(folder)]
    assert losses[0] > 5
    assert 0.005 < np.mean(losses[-100:]) < 0.02


# Resume.


@pytest.mark.parametrize(("number", "accumulate"), [(signal.SIGTERM, 1), (signal.SIGINT, 4)])
def test_a_signal_saves_and_resuming_gives_the_same_bits(tmp_path, monkeypatch, number, accumulate):
    settings = config(accumulate=accumulate, sample_every=17)
    monkeypatch.setattr(Stops, "number", number)
    before = signal.getsignal(number)
    outcome = run(tmp_path / "a", settings, Stops)
    assert (outcome.step, outcome.finished) == (17, False)
    assert signal.getsignal(number) == before
    assert outcome.checkpoint == tmp_path / "a/training/step_00000017"
    assert final_state(tmp_path / "a", settings)[0] == 17
    assert not (tmp_path / "a/config.json").exists()
    outcome = run(tmp_path / "a", settings, resume=True)
    assert (outcome.step, outcome.finished) == (40, True)
    run(tmp_path / "b", settings)
    assert_same_bits(final_state(tmp_path / "a", settings), final_state(tmp_path / "b", settings))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_at_random_and_resumed_gives_the_same_bits(tmp_path, accumulate):
    """SIGKILL twice, wherever the process happens to be; what is not free to change stays the same."""
    settings = config(num_steps=4000, checkpoint_every=10, accumulate=accumulate)
    rng = np.random.default_rng()
    command = [sys.executable, "-m", "tests.toy_stage", tmp_path / "a", settings.to_json()]
    reached = 0
    for options in ([], ["--resume"]):
        process = subprocess.Popen([*command, *options], cwd=ROOT)
        goal, deadline = reached + 10 * rng.integers(1, 6), time.monotonic() + 120
        while reached < goal:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
            found = checkpoints.latest(tmp_path / "a/training")
            reached = int(found.name[5:]) if found else 0
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    relaxed = config(num_steps=4000, checkpoint_every=0, accumulate=accumulate, log_every=50)
    run(tmp_path / "a", relaxed, resume=True)
    run(tmp_path / "b", relaxed)
    assert_same_bits(final_state(tmp_path / "a", settings), final_state(tmp_path / "b", settings))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    a, b = (
        checkpoint.restore(tmp_path / name / "transformer", ToyStage(settings).init(jax.random.key(0))["ema"])
        for name in "ab"
    )
    assert_same_bits(a, b)
    assert not [name for name in contents(tmp_path / "a") if name.startswith(".")]


def test_resuming_what_is_finished_writes_the_model_folder_again(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "a")
    shutil.rmtree(tmp_path / "a/transformer")
    assert run(tmp_path / "a", resume=True).finished
    assert (tmp_path / "a/transformer").is_dir()
    assert_same_bits(final_state(tmp_path / "a"), final_state(whole))
    assert metrics(tmp_path / "a") == metrics(whole)


def test_resuming_without_a_checkpoint_starts(tmp_path, whole):
    run(tmp_path, resume=True)
    assert_same_bits(final_state(tmp_path), final_state(whole))


def test_what_is_there_is_not_trained_over(tmp_path, whole):
    with pytest.raises(FileExistsError, match="step_00000040 exists: pass --resume"):
        run(whole)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is a model folder already"):
        run(tmp_path)


# Files.


def test_metrics_are_a_line_an_update(whole):
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(40))
    assert all(set(line) == {"step", "loss", "grad_norm", "learning_rate"} for line in lines)
    settings = config()
    stage = ToyStage(settings)
    state, data, update = stage.init(init_key(settings.seed)), stage.data(), jax.jit(stage.update)
    for step in range(6):
        state, expected = update(state, jnp.int32(step), data)
        for name, value in expected.items():
            np.testing.assert_allclose(lines[step][name], value, rtol=1e-5)


def test_metrics_after_the_resumed_update_are_dropped(tmp_path, whole):
    """Also a line that a kill cut off."""
    run(tmp_path, config(sample_every=20), Stops)
    path = tmp_path / "training/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 20
    beyond = [json.dumps({"step": step, "elapsed_s": 0.0, "loss": -1.0}) + "\n" for step in (20, 21)]
    path.write_text("".join([*lines, *beyond, '{"step": 22, "el']))
    run(tmp_path, config(sample_every=20), resume=True)
    assert metrics(tmp_path) == metrics(whole)
    elapsed = [json.loads(line)["elapsed_s"] for line in path.read_text().splitlines()]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("last", ['{"step": 2, "el', "\0\0\n", "3\n", '{"loss": 1}\n', '{"step": 7}\n'])
def test_metrics_that_cannot_be_read_are_dropped(tmp_path, last):
    good = ['{"step": 0}\n', '{"step": 1}\n']
    (tmp_path / "m").write_text("".join([*good, last, '{"step": 3}\n']))
    with contextlib.closing(MetricsLog(tmp_path / "m", 7)) as log:
        log.write(2, 1.5, {"loss": math.inf, "b": 2.0})
    assert (tmp_path / "m").read_text() == "".join(
        [*good, '{"step": 2, "elapsed_s": 1.5, "loss": null, "b": 2.0}\n']
    )
    assert os.listdir(tmp_path) == ["m"]


def test_the_last_two_checkpoints_are_kept(whole):
    assert contents(whole) == ["config.json", "metrics.jsonl", "step_00000035", "step_00000040"]
    assert json.loads((whole / "training/config.json").read_text()) == config().to_dict()


def test_samples(tmp_path):
    run(tmp_path, config(sample_every=15), fps=8)
    assert sorted(os.listdir(tmp_path / "training/samples")) == [f"step_{s:08d}.mp4" for s in (15, 30, 40)]
    frames = iio.imread(tmp_path / "training/samples/step_00000015.mp4")
    assert frames.shape == (5, 8, 18, 3)  # three videos of 7 x 6 in a row, to even sides


def test_the_model_folder(tmp_path, whole):
    """What was trained, the moving average of it, and the rest from where the run started."""
    start = tmp_path / "start"
    (start / "tokenizer").mkdir(parents=True)
    (start / "tokenizer/words").write_text("a b")
    checkpoint.save(start / "vae", {"a": jnp.ones(3)})
    checkpoint.save(start / "transformer", {"old": jnp.ones(3)})
    (start / "config.json").write_text(preset("tiny").to_json())
    run(tmp_path / "a", config(init_from=str(start)))
    assert sorted(os.listdir(tmp_path / "a")) == [
        "config.json",
        "tokenizer",
        "training",
        "transformer",
        "vae",
    ]
    assert (tmp_path / "a/tokenizer/words").read_text() == "a b"
    assert checkpoint.restore(tmp_path / "a/vae", {"a": jnp.zeros(3)})["a"].tolist() == [1, 1, 1]
    assert ModelConfig.from_json((tmp_path / "a/config.json").read_text()).kind == "bidirectional"
    _, state = final_state(whole)
    abstract = jax.eval_shape(lambda: state["ema"])
    exported = checkpoint.restore(tmp_path / "a/transformer", abstract)
    assert_same_bits(jax.tree.map(np.asarray, exported), state["ema"])
    assert not np.array_equal(state["ema"]["kernel"], state["params"]["kernel"])


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, whole):
    """From the second checkpoint on, files are limited to 300 bytes in another process."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from jax_causal.training import checkpoints, trainer; from tests.toy_stage import ToyStage, config\n"
        "save = checkpoints.save\n"
        "def limited(folder, step, *rest):\n"
        "    if step == 10: resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))\n"
        "    return save(folder, step, *rest)\n"
        "checkpoints.save = limited\n"
        "try: trainer.train(ToyStage(config()), config(), Path(sys.argv[1]))\n"
        "except OSError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "is its disk full?" in result.stdout
    assert contents(tmp_path) == ["config.json", "metrics.jsonl", "step_00000005"]
    assert final_state(tmp_path)[0] == 5
    run(tmp_path, resume=True)
    assert_same_bits(final_state(tmp_path), final_state(whole))


# What goes wrong.


@pytest.mark.parametrize("log_every", [1, 3, 100])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path, whole, log_every):
    settings = config(options={"nan_at": 22}, log_every=log_every)
    with pytest.raises(NotFinite, match=r"update 22: loss is nan\. .*step_00000022"):
        run(tmp_path, settings)
    assert final_state(tmp_path, settings)[0] == 22
    assert metrics(tmp_path)[22] == {
        "step": 22,
        "loss": None,
        "grad_norm": 0.0,
        "learning_rate": pytest.approx(0.02),
    }
    assert metrics(tmp_path)[:22] == metrics(whole)[:22]
    # The state is that of 22 updates: going on with a loss that is finite ends as if nothing had happened.
    run(tmp_path, config(), resume=True, allow_changes=True)
    assert_same_bits(final_state(tmp_path), final_state(whole))


def test_without_guard_the_last_checkpoint_is_the_last_good_state(tmp_path):
    settings = config(options={"nan_at": 22}, guard=False, log_every=100)
    with pytest.raises(NotFinite, match=r"update 22: loss is nan\. .*step_00000020"):
        run(tmp_path / "a", settings)
    assert contents(tmp_path / "a") == ["config.json", "metrics.jsonl", "step_00000015", "step_00000020"]
    assert len(metrics(tmp_path / "a")) == 23
    with pytest.raises(NotFinite, match=r"not saved: set checkpoint_every"):
        run(tmp_path / "b", config(options={"nan_at": 22}, guard=False, checkpoint_every=0))
    assert checkpoints.latest(tmp_path / "b/training") is None


def test_another_configuration(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "a")
    settings = config(learning_rate=0.5, options={"noise": 1.0}, log_every=7)
    with pytest.raises(ValueError) as error:
        run(tmp_path / "a", settings, resume=True)
    assert "learning_rate was 0.02, is 0.5; options.noise was null, is 1.0. " in str(error.value)
    assert "log_every" not in str(error.value)
    run(tmp_path / "a", config(num_steps=45), resume=True, allow_changes=True)
    assert final_state(tmp_path / "a")[0] == 45


def test_another_state(tmp_path, whole):
    class Other(ToyStage):
        def init(self, key):
            state = super().init(key)
            params = {"kernel": jnp.zeros((8, 5)), "scale": jnp.zeros(2)}
            return state | {"params": params}

        def update(self, state, step, data):
            return state, {"loss": jnp.float32(0)}

    shutil.copytree(whole, tmp_path / "a")
    with pytest.raises(ValueError) as error:
        run(tmp_path / "a", stage=Other, resume=True)
    assert "1 missing: params.scale" in str(error.value)
    assert "3 unexpected: params.layers" in str(error.value)
    assert "params.kernel is (8, 4), expected (8, 5)" in str(error.value)


# Orbax leaves failed reads behind to be collected; they are reported through our own exception.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["record", "edited", "state", "cut"])
def test_damaged_checkpoints(tmp_path, whole, damage):
    shutil.copytree(whole, tmp_path / "a")
    path = tmp_path / "a/training/step_00000040"
    record = path / "record.json"
    if damage == "record":
        record.write_text(record.read_text()[:50])
    elif damage == "edited":
        record.write_text(record.read_text().replace('"learning_rate": 0.02', '"learning_rate": 0.03'))
    elif damage == "state":
        shutil.rmtree(path / "state")
    else:
        largest = max((f for f in (path / "state").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"step_00000040 is damaged .*: delete it to go on from step_00000035"
    ):
        run(tmp_path / "a", resume=True)
    shutil.rmtree(path)
    run(tmp_path / "a", resume=True)
    assert_same_bits(final_state(tmp_path / "a"), final_state(whole))


def test_stages_that_do_not_keep_to_the_form(tmp_path):
    class Grows(ToyStage):
        def update(self, state, step, data):
            state, metrics = super().update(state, step, data)
            return state | {"ema": state["ema"] | {"kernel": jnp.zeros((9, 4))}}, metrics

    class Nameless(ToyStage):
        def update(self, state, step, data):
            return state, {"error": jnp.float32(0)}

    with pytest.raises(ValueError, match=r"\['ema'\]\['kernel'\] was \(\(8, 4\).*is \(\(9, 4\)"):
        run(tmp_path, stage=Grows)
    with pytest.raises(ValueError, match='"loss" among them'):
        run(tmp_path, stage=Nameless)


# How it runs.


def test_arrays_that_init_closes_over_are_not_compiled_in(tmp_path):
    """Weights of a folder to start from would be constants of the program."""
    stage = ToyStage(
        config(), components={"transformer": {"kernel": np.ones((8, 4), np.float32), "layers": {}}}
    )
    init, consts, abstract = trainer._hoisted(stage.init, jax.random.key(0))
    assert [c.shape for c in consts] == [(8, 4)]
    state = jax.jit(init)(consts, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, abstract)
    assert_same_bits(state["ema"]["kernel"], np.ones((8, 4)))


def test_components_that_init_reads_are_arguments_too(tmp_path):
    """Reading a checkpoint while `init` is traced gives values, not traces."""
    tiny, parallel = preset("tiny"), ToyStage(config()).parallel
    params = modules.init(UMT5Encoder, tiny.text_encoder, jax.random.key(0))
    checkpoint.save(tmp_path / "text_encoder", params)
    components = Components(tmp_path, tiny, parallel)
    init, consts, _ = trainer._hoisted(lambda key: {"a": components["text_encoder"]}, jax.random.key(0))
    assert len(consts) == len(jax.tree.leaves(params))
    assert_same_bits(jax.jit(init)(consts, jax.random.key(0)), {"a": params})


def test_keys_of_the_start_and_of_updates_differ():
    """A key splits into what folding in small numbers gives: the start must not share its key with the updates."""
    start = jax.random.key_data(jax.random.split(init_key(3), 8)).tolist()
    updates = jax.random.key_data(jnp.stack([step_key(3, i) for i in range(8)])).tolist()
    assert not [key for key in start if key in updates]


@pytest.mark.sp
@pytest.mark.parametrize(
    ("data", "seq", "shard_params"), [(8, 1, False), (2, 4, False), (8, 1, True), (1, 8, True)]
)
def test_eight_devices_give_the_same_losses(tmp_path, whole, data, seq, shard_params):
    parallel = SequenceParallel(data * seq, data=data, shard_params=shard_params).for_model(preset("tiny"))
    assert parallel.mesh.shape["data"] == data
    seen = []

    class Watched(ToyStage):
        def __init__(self, settings):
            super().__init__(settings, parallel=parallel)

        def sample(self, state):
            seen.append(jax.tree.map(lambda x: (x.sharding, x.shape), state))

    settings = config(mesh={"data": data, "seq": seq}, shard_params=shard_params, sample_every=20)
    run(tmp_path, settings, Watched, parallel=parallel)
    for one, many in zip(metrics(whole), metrics(tmp_path), strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(many[name], one[name], rtol=1e-4)
    # Moments and averages lie as the parameters do.
    state = seen[-1]
    kernel = state["params"]["kernel"]
    assert (
        kernel
        == state["optimizer"]["mu"]["kernel"]
        == state["optimizer"]["nu"]["kernel"]
        == state["ema"]["kernel"]
    )
    assert kernel[0].shard_shape(kernel[1]) == ((1, 4) if shard_params else (8, 4))
    # A run may go on with other devices.
    step, state = final_state(tmp_path, settings)
    assert step == 40
    np.testing.assert_allclose(
        state["params"]["kernel"], final_state(whole)[1]["params"]["kernel"], rtol=1e-4
    )


@pytest.mark.sp
def test_eight_devices_resume_to_the_same_bits(tmp_path):
    parallel = SequenceParallel(8, data=8, shard_params=True).for_model(preset("tiny"))

    def stage(cls):
        return lambda settings: cls(settings, parallel=parallel)

    settings = config(mesh={"data": 8}, shard_params=True, sample_every=13)
    assert run(tmp_path / "a", settings, stage(Stops), parallel=parallel).step == 13
    run(tmp_path / "a", settings, stage(ToyStage), parallel=parallel, resume=True)
    run(tmp_path / "b", settings, stage(ToyStage), parallel=parallel)
    assert_same_bits(final_state(tmp_path / "a", settings), final_state(tmp_path / "b", settings))


def test_data_is_split_as_a_batch_unless_the_stage_laid_it_out():
    parallel = SequenceParallel(8, data=4).for_model(preset("tiny"))
    mesh = parallel.mesh
    settled = jax.device_put(np.zeros((4, 8)), jax.NamedSharding(mesh, jax.P(None, "heads")))
    data = {"clips": np.zeros((16, 3)), "odd": np.zeros((3, 3)), "settled": settled, "scalar": jnp.int32(3)}
    placed = trainer._placed_data(data, parallel)
    shards = {name: x.sharding.shard_shape(x.shape) for name, x in placed.items()}
    assert shards == {
        "clips": (4, 3),
        "odd": (3, 3),
        "settled": settled.sharding.shard_shape((4, 8)),
        "scalar": (),
    }
    assert trainer._placed_data(None, parallel) is None


def test_the_host_waits_for_no_update(tmp_path, monkeypatch):
    """Metrics are read `_LAG` updates late: no value of the last ones is asked for before the loop has to."""
    reads = []
    collect = trainer._Run.collect

    def watched(self, until):
        reads.append((self.step, until))
        return collect(self, until)

    monkeypatch.setattr(trainer._Run, "collect", watched)
    run(tmp_path, config(checkpoint_every=0, log_every=5))
    assert reads[:8] == [(step, step - 2) for step in range(5, 41, 5)]


def test_the_toy_of_the_tests_is_a_program():
    """The runs that are killed are of this stage, with its configuration passed through JSON."""
    assert toy_stage.TrainConfig.from_json(config().to_json()) == config()
