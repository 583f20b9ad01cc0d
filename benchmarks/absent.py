"""The programs of training, lowered for devices that are not there; shared by tpu_compile.py and gpu_compile.py.

  draw: drawing the denoiser's batch from the preset's replay.
  denoiser, reward_end, actor_critic: one update, from a replay of --slots frames, so that the working memory is that of
    the networks.
  epoch: all updates in their loops, from the preset's replay, as a run executes them. It takes as long to compile as
    the others together and is not part of the default.
  act: the policy's choice of actions for a step of the environments.

A device that is not there is one of a topology that its compiler describes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flops
import jax
import numpy as np
import throughput
from absl import flags

from jedi_jax import config as config_lib
from jedi_jax import replay
from jedi_jax.agent import make_act
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models.build import build
from jedi_jax.training import memory
from jedi_jax.training.learner import Learner
from jedi_jax.training.parallel import Devices
from jedi_jax.training.updates import make_update
from jedi_jax.types import Array, EnvSpec

PROGRAMS = ("draw", *throughput.PHASES, "epoch", "act")
PARTS = flags.DEFINE_list("programs", ["draw", *throughput.PHASES], f"Programs: {', '.join(PROGRAMS)}.")
SLOTS = flags.DEFINE_integer("slots", 2_000, "Capacity in frames of the replay of updates.", lower_bound=100)
ADD = flags.DEFINE_bool("add", default=False, help="Keeps the record's programs and compiles the missing ones.")


def check_programs() -> None:
  """Checks --programs.

  Raises:
    UserError: for an unknown name.
  """
  unknown = [name for name in PARTS.value if name not in PROGRAMS]
  if unknown:
    raise UserError(f"--programs: {unknown[0]!r} is not one of {', '.join(PROGRAMS)}")


def complete(row: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a row of a record with what was not recorded at first."""
  return {"dtype": "float32", "env": "atari/Breakout", "slots": 2_000, **row}


def keys(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> set[tuple[Any, ...]]:
  """Returns what tells a record's rows apart: their values of these names."""
  return {tuple(row[name] for name in names) for row in map(complete, rows)}


def compile_program(part: str, config: Config, spec: EnvSpec, devices: Devices) -> tuple[Any, dict[str, Any]]:
  """Compiles one program.

  Args:
    part: one of `PROGRAMS`.
    config: of the runs.
    spec: of their environments.
    devices: for which it is compiled.

  Returns:
    The compiled program; and its seconds of compilation, memory in MiB for one device and, of an update, 'TFLOP' for
    one device.
  """
  if part in throughput.PHASES:
    config = config_lib.override(config, {"replay.capacity": SLOTS.value, "replay.final_frames": 0})
  learner = Learner(config, spec, devices)
  settings: dict[str, Any] = {
    "batch_size": config.training.batch_size,
    "age_weights": config.replay.age_weights,
    "age_groups": config.replay.age_groups,
  }
  state, stored = learner.shapes
  distributed = devices.shapes((state, stored))
  phases = {phase.name: (i, phase) for i, phase in enumerate(learner.model.phases)}
  row: dict[str, Any] = {"state MiB": memory.size(state) / 2**20, "replay MiB": memory.size(stored) / 2**20}
  if part == "epoch":
    lowered = learner.lower()
  elif part == "draw":
    draw = _draw(phases["denoiser"][1].length, **settings)
    keys = devices.shapes(jax.ShapeDtypeStruct((2,), np.uint32))
    lowered = devices.map(draw).lower(distributed[1], keys)
  elif part == "act":
    lowered = _lower_act(config, spec, devices, state.params)
  else:
    index, phase = phases[part]
    update = make_update({index: phase}, learner.optimizers, **settings)
    row["TFLOP"] = flops.count(update, state, stored) * devices.runs / devices.count / 1e12
    lowered = devices.map(update, donate=(0,)).lower(*distributed)
  start = time.perf_counter()
  compiled = lowered.compile()
  row["compile s"] = time.perf_counter() - start
  found = compiled.memory_analysis()
  return compiled, row | {
    "arguments MiB": found.argument_size_in_bytes / 2**20,
    "working MiB": found.temp_size_in_bytes / 2**20,
    "output MiB": (found.output_size_in_bytes - found.alias_size_in_bytes) / 2**20,  # Without donated buffers.
  }


def _draw(length: int, *, batch_size: int, **settings: Any) -> Callable[[replay.ReplayState, Array], Any]:
  def draw(stored: replay.ReplayState, key: Array) -> Any:
    keys = jax.random.split(jax.random.wrap_key_data(key), batch_size)
    return replay.sample(stored, keys, length=length, beyond_end=False, final_frames=True, **settings)

  return draw


def _lower_act(config: Config, spec: EnvSpec, devices: Devices, params: Any) -> Any:
  """Lowers the policy for one run, since packed runs act by themselves."""
  model = build(config, spec)
  act, alone = make_act(model), Devices(devices.devices[:1])
  count = config.env.num_envs
  arguments = (
    params,
    jax.ShapeDtypeStruct((count, *spec.observation_shape), np.uint8),
    jax.eval_shape(lambda: model.initial_state(count)),
    jax.ShapeDtypeStruct((count,), np.bool_),
    jax.ShapeDtypeStruct((2,), np.uint32),
    jax.ShapeDtypeStruct((), np.uint32),
    jax.ShapeDtypeStruct((), np.float32),
  )
  return alone.map(act).lower(*alone.shapes(arguments))
