"""The training loop: compiled updates, metrics that never stall the device, exact resume.

What lies in the result folder: the model folder that the stage leaves at its end, and `training/` with
`config.json`, `metrics.jsonl`, `samples/` and the last checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal.console import Display, nbytes
from jax_causal.parallel import Parallel, SingleDevice
from jax_causal.training import checkpoints
from jax_causal.training import folder as folders
from jax_causal.training.config import TrainConfig
from jax_causal.training.metrics import MetricsLog
from jax_causal.training.samples import save_samples
from jax_causal.training.stage import Stage, init_key

# Metrics are read this many updates after they were asked for, so that the device always has work.
_LAG = 2


class NotFinite(ArithmeticError):
    """A metric is NaN or infinite; the message names the last good state."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      step: updates done.
      finished: all of them are, and the model folder is complete. Otherwise a signal ended the run.
      checkpoint: the last one.
      elapsed_s: of training, over all resumed parts.
    """

    step: int
    finished: bool
    checkpoint: Path
    elapsed_s: float


def train(
    stage: Stage,
    config: TrainConfig,
    folder: Path,
    *,
    parallel: Parallel | None = None,
    display: Display | None = None,
    fps: int = 16,
    resume: bool = False,
    allow_changes: bool = False,
) -> Outcome:
    """Trains a stage to its end, or until Ctrl-C or SIGTERM, which save a checkpoint. A second one ends at once.

    Args:
      folder: of the result; made if need be.
      parallel: gives state and data their shardings; that of the stage.
      fps: of sample videos.
      resume: go on from the last checkpoint in `folder`; from the start where there is none.
      allow_changes: resume with another configuration than before.

    Raises:
      NotFinite: a metric is NaN or infinite. With `config.guard` the state before that update is saved.
      FileExistsError: there are checkpoints and `resume` is not set, or `folder` is another model's.
      ValueError: the checkpoint is damaged, or of another configuration or stage.
      OSError: the disk is full; the checkpoints before are intact.
    """
    parallel, display = parallel or SingleDevice(), display or Display(quiet=True)
    training = folder / "training"
    found = checkpoints.latest(training)
    if found and not resume:
        raise FileExistsError(f"{found} exists: pass --resume to go on, or choose another folder")
    if not found and (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is a model folder already: choose another folder")
    training.mkdir(parents=True, exist_ok=True)
    checkpoints.remove_leftovers(training)
    with _signals() as stop:
        run = _Run(stage, config, training, parallel, display, fps, stop)
        run.begin(found, allow_changes)
        outcome = run.loop()
        if outcome.finished:
            with display.working("writing the model folder"):
                model = stage.trained_model(run.state)
                folders.export(folder, model, stage.export(run.state), config.init_from)
    return outcome


class _Run:
    def __init__(self, stage, config, training, parallel, display, fps, stop: list[int]):
        self.stage, self.config, self.training, self.stop = stage, config, training, stop
        self.parallel, self.display, self.fps = parallel, display, fps
        self.step, self.elapsed_s = 0, 0.0
        self.pending: deque[tuple[int, jax.Array]] = deque()
        self.saved: Path | None = None

    @property
    def state(self) -> dict:
        return self.carry["state"]

    def begin(self, found: Path | None, allow_changes: bool) -> None:
        """State and data on the devices, and everything compiled."""
        key = init_key(self.config.seed)
        init, consts, abstract = _hoisted(self.stage.init, key)
        self.abstract = abstract_carry(abstract, self.parallel)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        if found:
            with self.display.working(f"restoring {found}"):
                self.step, state, self.elapsed_s = checkpoints.restore(
                    found, self.abstract["state"], self.config, allow_changes=allow_changes
                )
            self.saved = found
        else:
            with self.display.working("initialising"):
                state = jax.jit(init, out_shardings=shardings["state"])(consts, key)
        self.carry = {"good": jax.device_put(True, shardings["good"]), "state": state}
        (self.training / "config.json").write_text(self.config.to_json(), encoding="utf-8")
        if self.step == self.config.num_steps:
            return
        with self.display.working("preparing data"):
            self.data = _placed_data(self.stage.data(), self.parallel)
        with self.display.working("compiling"):
            self.names, self.update = compile_update(
                self.stage, self.abstract, self.data, guard=self.config.guard
            )
        memory = self.update.memory_analysis()
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        self.display.print(
            f"state {nbytes(held)}" + (f", temporary {nbytes(memory.temp_size_in_bytes)}" if memory else "")
        )

    def loop(self) -> Outcome:
        config = self.config
        start = time.perf_counter() - self.elapsed_s
        self.clock: Callable[[], float] = lambda: time.perf_counter() - start
        self.log = MetricsLog(self.training / "metrics.jsonl", self.step)
        with (
            contextlib.closing(self.log),
            self.display.training(config.stage, self.step, config.num_steps) as self.show,
        ):
            while self.step < config.num_steps and not self.stop:
                self.carry, values = self.update(self.carry, np.int32(self.step), self.data)
                values.copy_to_host_async()
                self.pending.append((self.step, values))
                self.step += 1
                if self.step % config.log_every == 0:
                    self.collect(self.step - _LAG)
                if _due(self.step, config.checkpoint_every):
                    self.save()
                if _due(self.step, config.sample_every):
                    self.sample()
            self.collect(self.step)
            finished = self.step == config.num_steps
            if finished and config.sample_every and self.step % config.sample_every:
                self.sample()
            if self.saved is None or self.saved.name != checkpoints.name(self.step):
                self.save()
        return Outcome(self.step, finished, self.saved, self.clock())

    def collect(self, until: int) -> None:
        """Writes and shows the metrics of the updates before `until`. Raises NotFinite."""
        while self.pending and self.pending[0][0] < until:
            step, values = self.pending.popleft()
            metrics = dict(zip(self.names, np.asarray(values).tolist(), strict=True))
            self.log.write(step, self.clock(), metrics)
            if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
                self.fail(step, bad, metrics)
            self.show(step + 1, metrics)
        self.log.flush()

    def fail(self, step: int, bad: list[str], metrics: dict) -> None:
        self.pending.clear()
        self.log.flush()
        if self.config.guard:  # the state has not changed since: see `checked_update`
            self.step = step
            self.save()
        told = ", ".join(f"{name} is {metrics[name]}" for name in bad)
        raise NotFinite(
            f"update {step}: {told}. The last good state is {self.saved or 'not saved: set checkpoint_every'}. A lower "
            "learning rate, a smaller grad_clip or float32 may help: --resume --allow-changes --set learning_rate=..."
        )

    def save(self) -> None:
        self.collect(self.step)
        self.log.flush()
        self.saved = checkpoints.save(self.training, self.step, self.state, self.config, self.clock())

    def sample(self) -> None:
        self.collect(self.step)
        videos = self.stage.sample(self.state)
        if videos is not None:
            save_samples(
                self.training / "samples" / checkpoints.name(self.step), np.asarray(videos), self.fps
            )


def abstract_carry(state, parallel: Parallel) -> dict:
    """What an update carries on, {"good", "state"}, as `ShapeDtypeStruct`s with shardings; `state` has none yet."""
    return folders.placed({"good": jax.ShapeDtypeStruct((), bool), "state": state}, parallel)


def compile_update(stage: Stage, carry, data, *, guard: bool) -> tuple[list[str], Callable]:
    """`checked_update`, compiled: `carry` is donated. Takes forms with shardings, or arrays for `data`."""
    names, update = checked_update(stage, carry["state"], data, guard=guard)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carry)
    jitted = jax.jit(update, donate_argnums=0, out_shardings=(shardings, shardings["good"]))
    return names, jitted.lower(carry, np.int32(0), data).compile()


def checked_update(stage: Stage, state, data, *, guard: bool) -> tuple[list[str], Callable]:
    """The names of the metrics, and an update that with `guard` stops changing the state once a metric is not finite.

    Args:
      state, data: of the shapes that the stage has; `jax.ShapeDtypeStruct`s will do.

    Returns:
      Names, "loss" first, and a function ({"good", "state"}, step, data) -> (the same, metrics fp32 [M]). What was
      the last good state is so still there when the host learns, a few updates later, that it is.
    """
    once = jax.jit(stage.update, inline=True)  # traced here, and not again where it is compiled: 20 s at 1.3B
    new, metrics = jax.eval_shape(once, state, jax.ShapeDtypeStruct((), jnp.int32), data)
    if "loss" not in metrics or any(value.shape for value in metrics.values()):
        raise ValueError(f'metrics must be scalars with "loss" among them, not {metrics}')
    was, now = (
        {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype)
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (state, new)
    )
    if differing := [key for key in was | now if was.get(key) != now.get(key)]:
        key = differing[0]
        raise ValueError(
            f"an update must not change the state's form: {key} was {was.get(key)}, is {now.get(key)}"
        )
    names = ["loss", *sorted(set(metrics) - {"loss"})]

    def update(carry, step, data):
        new, metrics = once(carry["state"], step, data)
        values = jnp.stack([metrics[name].astype(jnp.float32) for name in names])
        good = carry["good"] & jnp.isfinite(values).all()
        if guard:
            new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, carry["state"])
        return {"good": good, "state": new}, values

    return names, update


def _placed_data(data, parallel: Parallel):
    """Arrays sharded along their first axis; those that are on all devices already stay as the stage laid them out."""
    shardings = parallel.shardings(jax.eval_shape(lambda: data), "data")

    def place(x, sharding):
        settled = isinstance(x, jax.Array) and len(x.sharding.device_set) == parallel.num_devices
        return x if settled else jax.device_put(x, sharding)

    return jax.tree.map(place, data, shardings)


def placed_like(data, parallel: Parallel):
    """The form of `stage.data_like()` with shardings: what has none yet is sharded along its first axis."""
    shardings = parallel.shardings(data, "data")
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or sharding),
        data,
        shardings,
    )


def _hoisted(function: Callable, key: jax.Array) -> tuple[Callable, list, dict]:
    """`function` with the arrays that it closes over as its first argument, these arrays, and the form of the result.
    As constants they may not exceed 2 GB, and are slow to compile long before."""
    traced, abstract = jax.make_jaxpr(function, return_shape=True)(key)
    structure = jax.tree.structure(abstract)

    def run(consts, key):
        return jax.tree.unflatten(structure, jax.core.eval_jaxpr(traced.jaxpr, consts, key))

    return run, traced.consts, abstract


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that Ctrl-C and SIGTERM are put on; a second one of a kind acts as ever. Threads other than the main one
    get none."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number, frame):
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
