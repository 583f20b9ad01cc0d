"""Random configurations, as texts through the public parser: each trains a debug step or is refused in one line.

The strategy walks the typed fields of the configuration records, so that a new setting is fuzzed without a word here.
Some of the examples hold plausible values alone, the others bad ones among them; about a third is accepted. All that
are accepted are built, and the update of every phase is traced (`jax.eval_shape`): that is the whole epoch without its
loops, which trace the same updates twice. Compiling takes half a minute of a core each: six whole runs are trained, one
of each variant, and by hand, outside of the group, a step of every accepted program that is small enough to be run:

  JAX_DISABLE_MOST_OPTIMIZATIONS=1 python -m pytest -n 2 --dist load -m slow -rP tests/faults/test_fuzz_config.py

Plausible values keep networks, batches and schedules small: a trace must take a second and a training of one epoch few.
Bad values are as huge as they like. What the bounds of the settings let pass is traced whatever memory it would take,
for tracing takes none; but `DEEP` settings, of which Python repeats its work, are not tried at their upper bounds: a
network of 64 blocks takes minutes to trace, and is no mistake. Trained are only runs of less than 256 MiB.
"""

import itertools
import math
from typing import NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import jedi_jax
from jedi_jax import config as config_lib
from jedi_jax.config import Config, make_config
from jedi_jax.envs.catch import SPEC
from jedi_jax.errors import UserError
from jedi_jax.training import memory
from jedi_jax.training.epoch import make_epoch
from jedi_jax.training.learner import Learner
from jedi_jax.training.parallel import Devices
from jedi_jax.training.updates import make_update

SETTINGS = dict(config_lib.settings(Config))

SMALL = {
  "encoder.channels": "4,4",
  "encoder.downsample": "true,true",
  "denoiser.channels": "4",
  "denoiser.conditioning_width": "8",
  "denoiser.conditioning_frames": "2",
  "denoiser.targets": "1",
  "sampler.num_steps": "1",
  "reward_end.channels": "4",
  "reward_end.lstm_width": "8",
  "actor_critic.lstm_width": "8",
  "actor_critic.horizon": "2",
  "collect.total_steps": "24",
  "collect.first_epoch_min_steps": "24",
  "collect.first_epoch_max_steps": "24",
  "collect.steps_per_epoch": "24",
  **{f"training.{when}.{part}": "1" for when in ("first_updates", "updates") for part in
     ("denoiser", "reward_end", "actor_critic")},
  "training.final_epochs": "0",
  "training.batch_size": "2",
  "evaluation.episodes": "1",
  "evaluation.interval_epochs": "0",
  "evaluation.num_envs": "1",
}  # fmt: skip
"""One epoch of one update a phase on Catch, with the smallest networks."""

PIXELS = {
  "denoiser.channels": "4,4",
  "denoiser.depths": "1,1",
  "denoiser.attention": "false,false",
  "reward_end.channels": "4,4",
  "reward_end.depths": "1,1",
  "reward_end.attention": "false,false",
  "actor_critic.channels": "4,4",
  "actor_critic.downsample": "true,true",
}
"""Further settings of variant `diamond`."""

STEPS = ("0", "1", "2", "3", "4", "6", "8", "12", "24", "48")
PLAUSIBLE = {
  **{path: ("4", "8", "32", "40", "64") for path in SETTINGS if path.endswith(".channels")},
  **{path: ("2", "4", "6", "8", "12", "16") for path in SETTINGS if path.endswith("_width")},
  **{path: ("1", "1", "2") for path in SETTINGS if path.endswith(".depths")},
  "env.name": ("catch",),
  "env.action_slots": ("0", "3", "5"),
  "encoder.patch": ("1", "2", "4", "3"),
  "encoder.learns_from": ("prediction", "reward_end", "prediction,reward_end", "reward_end,reconstruction"),
  "denoiser.conditioning_frames": ("1", "2", "4"),
  "denoiser.targets": ("1", "2"),
  "sampler.num_steps": ("1", "2", "5"),
  "actor_critic.horizon": ("1", "2", "3"),
  "actor_critic.unroll": ("1", "2", "7"),
  "training.batch_size": ("1", "2", "3"),
  "replay.age_weights": ("1", "1.0", "0.5,0.5", "0,1", "0.25,0.25,0.25,0.25"),
  "variant": tuple(config_lib.VARIANTS),
  "preset": tuple(config_lib.PRESETS),
  "seed": ("0", "7", "2147483647"),
}
"""Texts of plausible values; what is not listed draws them by its type."""

ROWS = {name: [path for path in SETTINGS if path.startswith(f"{name}.") and
               SETTINGS[path].type in (tuple[int, ...], tuple[bool, ...])]
        for name in ("encoder", "denoiser", "reward_end", "actor_critic")}  # fmt: skip
"""Settings of one value a stage, which must be equally many."""

DEEP = (
  "denoiser.depths",
  "reward_end.depths",
  "denoiser.targets",
  "denoiser.conditioning_frames",
  "actor_critic.unroll",
)
"""Settings at whose upper bounds a trace takes minutes; beyond them they are tried."""

BAD = {
  int: ("0", "-1", "1.5", "1e3", "", "nan", "inf", "0x10", "1_0", "٣", "True", "None", "1,2", "9" * 30, "-" + "9" * 30),
  float: ("0", "-0.0", "-1", "1e-300", "5e-324", "1e30", "1e300", "-1e300", "nan", "inf", "-inf", "", "1e999", "x",
          "0,5", "1e-30"),
  bool: ("yes", "1", "", "TRUE", "None", "true,false", "fälse"),
  str: ("", "nonsense", "Catch", "atari/Nope", "λ", "a\tb", "../x", "jedi ", "None", "atari/Pong?skip=9-2"),
}  # fmt: skip
BAD_ROWS = (
  "",
  "()",
  "8,",
  "(8",
  "[[8]]",
  "8;8",
  "8,8,8,8,8,8,8,8",
  "-8",
  "0",
  "nan",
  "12",
  "33",
  "97",
  "true",
  "a,b",
  "2.0",
)


def plausible(path):
  field = SETTINGS[path]
  kind, metadata = field.type, field.metadata
  if path in PLAUSIBLE and path not in IN_ROWS:
    return st.sampled_from(PLAUSIBLE[path])
  if metadata["choices"] is not None:
    return st.sampled_from(metadata["choices"])
  return element(path, kind)


def element(path, kind):
  """One plausible value of a type within the setting's bounds, as text."""
  metadata = SETTINGS[path].metadata
  low, above, high = (metadata[name] for name in ("low", "above", "high"))
  if kind is bool:
    return st.sampled_from(("true", "false"))
  if kind is int:
    fitting = [text for text in STEPS if (low is None or int(text) >= low) and (high is None or int(text) <= high)]
    return st.sampled_from(fitting)
  bottom = low if low is not None else above if above is not None else -2.0
  return st.floats(bottom, min(high or 3.0, 3.0), exclude_min=above is not None).map(lambda x: f"{x:.3g}")


@st.composite
def rows(draw, name):
  """Equally long rows for all settings of a network that have a value a stage."""
  length = draw(st.integers(1, 2))
  texts = {}
  for path in ROWS[name]:
    kind = SETTINGS[path].type.__args__[0]
    one = st.sampled_from(PLAUSIBLE[path]) if path in PLAUSIBLE else element(path, kind)
    texts[path] = ",".join(draw(st.lists(one, min_size=length, max_size=length)))
  return texts


def bad(path):
  kind, metadata = SETTINGS[path].type, SETTINGS[path].metadata
  edges = []
  for bound in (metadata["low"], metadata["above"], metadata["high"]):
    if bound is not None:
      edges += [str(bound + delta) for delta in ((1,) if path in DEEP and bound == metadata["high"] else (-1, 0, 1))]
  if not isinstance(kind, type):
    return st.sampled_from((*BAD_ROWS, *edges)) | st.text(max_size=6)
  if kind is int and (metadata["high"] or math.inf) < 10**9:
    edges += [str(2**31), str(10**9)]
  return st.sampled_from((*BAD[kind], *edges)) | st.text(max_size=6)


IN_ROWS = set(itertools.chain(*ROWS.values()))
SINGLE = sorted(set(SETTINGS) - IN_ROWS - {"variant", "preset"})


@st.composite
def examples(draw):
  """A variant, and what is set: texts by path."""
  variant = draw(st.sampled_from(sorted(config_lib.VARIANTS)))
  texts = {}
  for name in sorted(draw(st.sets(st.sampled_from(sorted(ROWS)), max_size=2))):
    if not (variant == "diamond" and name == "encoder"):
      texts |= draw(rows(name))
  for path in draw(st.lists(st.sampled_from(SINGLE), min_size=1, max_size=6, unique=True)):
    texts[path] = draw(plausible(path))
  if draw(st.sampled_from((True, True, True, False, False))):
    for path in draw(st.lists(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=2, unique=True)):
      texts[path] = draw(bad(path))
  return variant, texts


def make(variant, texts):
  base = {**SMALL, **(PIXELS if variant == "diamond" else {})}
  return make_config(
    env="catch",
    variant=variant,
    preset="debug",
    overrides=[f"{path}={text}" for path, text in {**base, **texts}.items()],
  )


HOST = (
  "seed", "preset", "collect.", "evaluation.", "checkpoint.", "training.", "replay.capacity", "replay.final_frames",
  "env.name", "env.num_envs", "env.max_episode_steps", "env.life_loss_ends",
)  # fmt: skip
"""Settings of the host's loop, or of shapes that no code depends on."""


def program(config):
  """What tells the traced programs of two configurations apart: not the numbers of ordinary size in them.

  Those only become constants; a 0 may leave out a part, and a huge or a tiny one overflows or vanishes in Python.
  """
  key = [config.training.batch_size, bool(config.training.updates.probe or config.training.first_updates.probe)]
  for path, value in config_lib.flatten(config_lib.to_dict(config)).items():
    if not path.startswith(HOST):
      ordinary = isinstance(value, float) and 1e-3 <= abs(value) <= 1e3
      key.append((path, "ordinary" if ordinary else tuple(value) if isinstance(value, list) else value))
  return tuple(key)


def trace(config):
  """Traces the update of every phase on the shapes of a run; returns the bytes of the run's state and replay."""
  learner = Learner(config, SPEC, Devices.take(1))
  state, replay = learner.shapes
  phases = {phase.name: (index, phase) for index, phase in enumerate(learner.model.phases)}
  joint = config.training.order == "joint"
  for names in learner.groups.values() if joint else [(name,) for name in phases]:
    update = make_update(
      dict(phases[name] for name in names),
      learner.optimizers,
      batch_size=config.training.batch_size,
      age_weights=config.replay.age_weights,
      age_groups=config.replay.age_groups,
    )
    after, metrics = jax.eval_shape(update, state, replay)
    # What the epoch's loop carries must stay as it is.
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics
  return memory.size((state, replay))


class Found(NamedTuple):
  """The outcome of the examples.

  Attributes:
    accepted: configurations, with the bytes of their state and replay, None where the program was traced before.
    refused: what was set, and the message.
    faults: what was set, and any other exception.
  """

  accepted: list
  refused: list
  faults: list


def weigh(config):
  """Returns the bytes of a run's state and replay."""
  return memory.size(Learner(config, SPEC, Devices.take(1)).shapes)


def step(config):
  """Compiles the epoch and runs one update of each phase, on small random parameters and an empty replay."""
  learner = Learner(config, SPEC, Devices.take(1))
  epoch = make_epoch(
    learner.model,
    learner.optimizers,
    order=config.training.order,
    batch_size=config.training.batch_size,
    age_weights=config.replay.age_weights,
    age_groups=config.replay.age_groups,
  )
  generator = np.random.default_rng(0)
  state, replay = (jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree) for tree in learner.shapes)
  params = jax.tree.map(lambda x: (0.02 * generator.normal(size=x.shape)).astype(x.dtype), state.params)
  counts = {name: np.int32(1) for name in learner.phases}
  after, sums = jax.device_get(jax.jit(epoch)(state.replace(params=params), replay, counts))
  jax.clear_caches()
  assert after.updates == counts
  for name, metrics in sums.items():
    assert all(np.all(np.isfinite(value)) for value in metrics.values()), (name, metrics)


def fuzz(count, examine=None):
  """Makes so many configurations, the same ones every time, and examines each accepted program (traces it if None)."""
  examine = examine or trace
  found, traced = Found([], [], []), {}

  @hypothesis.settings(
    max_examples=count,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(examples())
  def one(example):
    variant, texts = example
    try:
      config = make(variant, texts)
      key = program(config)
      if key not in traced:
        traced[key] = examine(config)
        found.accepted.append((config, traced[key]))
      else:
        found.accepted.append((config, None))
    except UserError as error:
      found.refused.append((texts, str(error)))
    except Exception as error:
      found.faults.append((variant, texts, repr(error)))

  one()
  return found


def check(found, count):
  assert not found.faults
  assert len(found.accepted) + len(found.refused) >= 0.98 * count  # Hypothesis gives up where it only repeats itself.
  assert len(found.accepted) >= 0.25 * count
  assert len(found.refused) >= 0.25 * count
  for texts, message in found.refused:
    assert len(message.splitlines()) == 1, message
    assert any(path in message or (path == "env.name" and repr(text.strip()) in message)
               for path, text in texts.items()), (texts, message)  # fmt: skip


def trainable(found):
  """The accepted ones whose run takes seconds, taking turns by variant, those that compile faster first."""
  groups = {}
  for config, size in found.accepted:
    c, t, e = config.collect, config.training, config.evaluation
    epochs = 1 + -(-c.total_steps // c.steps_per_epoch) + t.final_epochs
    updates = sum(config_lib.flatten(config_lib.to_dict(t.updates)).values())
    first = sum(config_lib.flatten(config_lib.to_dict(t.first_updates)).values())
    short = epochs <= 6 and max(c.total_steps, updates, first, e.episodes, e.interval_episodes) <= 200
    if size is not None and size < 2**28 and short:
      groups.setdefault(config.variant, []).append(config)

  def stages(config):
    d, r = config.denoiser, config.reward_end
    rows = (config.encoder.channels, config.actor_critic.channels, d.channels, r.channels)
    return sum(map(len, rows)) + sum(d.depths) * (1 + d.targets) + sum(r.depths)

  for group in groups.values():
    group.sort(key=stages)
  turns = itertools.zip_longest(*(groups[variant] for variant in sorted(groups)))
  return [config for turn in turns for config in turn if config is not None]


def train(config, directory, console):
  result = jedi_jax.train(config, directory, devices=Devices.take(1), console=console)
  assert len(result["episode_returns"]) == config.evaluation.episodes
  assert math.isfinite(result["mean_return"])


def test_some_configurations_are_traced_or_refused_in_one_line():
  check(fuzz(16), 16)


@pytest.fixture(scope="module")
def many():
  return fuzz(500)


@pytest.mark.faults
def test_500_configurations_are_traced_or_refused_in_one_line(many):
  check(many, 500)


@pytest.mark.faults
@pytest.mark.parametrize("index", range(6))
def test_of_those_one_of_each_variant_trains_a_debug_step(many, index, tmp_path, quiet):
  train(trainable(many)[index], tmp_path / "run", quiet)


PARTS = 2
"""Parts that two workers share."""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_accepted_program_of_500_configurations_trains_a_step(part):
  found = fuzz(500, weigh)
  assert not found.faults
  programs = [(config, size) for config, size in found.accepted if size is not None]
  small = [config for config, size in programs if size < 2**28]
  print(f"{len(found.accepted)} accepted, {len(found.refused)} refused, {len(programs)} programs, {len(small)} small")
  faults, done = [], 0
  for config in small[part::PARTS]:
    try:
      step(config)
      done += 1
    except UserError as error:
      done += len(str(error).splitlines()) == 1
    except Exception as error:
      faults.append((config_lib.differences(make(config.variant, {}), config), repr(error)[:500]))
    print(f"part {part}: {done} of {len(small[part::PARTS])} trained a step, {len(faults)} failed", flush=True)

  assert not faults
