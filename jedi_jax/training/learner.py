"""The learner: everything of the runs that train together that lives on devices."""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jedi_jax import replay as replay_lib
from jedi_jax.config import Config
from jedi_jax.config.checks import misfit_together
from jedi_jax.errors import UserError, nearest
from jedi_jax.models.base import Build
from jedi_jax.models.build import build as build_model
from jedi_jax.models.build import with_num_actions
from jedi_jax.ops import kernels
from jedi_jax.replay import Chunk, ReplayState
from jedi_jax.training import dreams, hosts, seeds
from jedi_jax.training.collector import CHUNK_SLOTS
from jedi_jax.training.epoch import make_epoch
from jedi_jax.training.hosts import Operation
from jedi_jax.training.order import group_phases
from jedi_jax.training.parallel import Devices
from jedi_jax.training.seeds import Purpose
from jedi_jax.training.state import TrainState, make_init
from jedi_jax.training.updates import make_optimizers
from jedi_jax.types import EnvSpec, Params


class Learner:
  """Model, training state, replay and compiled programs of the runs that train together.

  Without an environment it trains on data of one's own:

    learner = Learner(config, spec)
    learner.start([learner.init(seed=0)], [replay.from_episodes(episodes)])
    [sums] = learner.update({"denoiser": 100, "reward_end": 100})

  Args:
    config: of the runs; the seed and the game do not matter.
    spec: of their environments.
    devices: the devices and the number of runs; all devices for one run if None.
    build: builds the model.
    leader: announces each operation to the other processes; None for no announcements.

  Attributes:
    model: of all runs; with several runs its functions are mapped over them.
    optimizers: by phase.
    groups: names of the phases that run together, by the name of their group, in order; see `order.group_phases`.
    epoch: (distributed state, distributed replay, counts as `traced` returns them) -> (state, sums); donates the state.
      Compiled for one set of shapes after `compile`.
    state: distributed `TrainState`; None before `start`.
    replay: distributed `ReplayState`; None before `start`.

  Raises:
    UserError: if sizes do not fit the environment or the devices.
  """

  def __init__(
    self,
    config: Config,
    spec: EnvSpec,
    devices: Devices | None = None,
    *,
    build: Build = build_model,
    leader: hosts.Leader | None = None,
  ):
    self.config, self.spec, self.devices = config, spec, devices or Devices()
    self.devices.check_batch(config.training.batch_size)
    self.devices.check_batch(config.actor_critic.batch_size, "actor_critic.batch_size")
    self.model = build(config, spec, packed=self.devices.packed)
    self.optimizers = make_optimizers(config, self.model.phases)
    order = config.training.order
    self.groups = {
      name: tuple(phase.name for phases in turns for phase in phases)
      for name, turns in group_phases(self.model.phases, order).items()
    }
    epoch = make_epoch(
      self.model,
      self.optimizers,
      order=order,
      batch_size=config.training.batch_size,
      age_weights=config.replay.age_weights,
      age_groups=config.replay.age_groups,
    )
    # Counts are shared by all devices.
    self._epoch = self.devices.map(epoch, in_axes=(0, 0, None), donate=(0,))
    self.epoch: Any = self._epoch
    self.state: Any = None
    self.replay: Any = None
    self._announce = (lambda *_: contextlib.nullcontext()) if leader is None else leader.announce
    self._add = self.devices.map(replay_lib.add, donate=(0,))
    watch = dreams.make_watch(self.model, steps=config.actor_critic.horizon, strips=config.probe.strips)
    self._watch = self.devices.map(lambda params, replay, key: watch(params, replay, jax.random.wrap_key_data(key)))
    self._init = make_init(self.model, self.optimizers, order)

  @property
  def phases(self) -> tuple[str, ...]:
    """Names of the phases, in order."""
    return tuple(phase.name for phase in self.model.phases)

  def init(self, seed: int, num_actions: int | None = None) -> TrainState:
    """Returns a fresh state on the host. Not compiled as a whole, which would take longer than its small programs.

    Args:
      seed: of the run.
      num_actions: of the run's environment, where `env.action_slots` has room for more; the spec's if None.
    """
    state = jax.device_get(self._init(jax.random.key(seeds.derive(seed, Purpose.TRAINING))))
    return state.replace(params=with_num_actions(state.params, num_actions or self.spec.num_actions))

  @functools.cached_property
  def shapes(self) -> tuple[TrainState, ReplayState]:
    """State and replay of one run with `jax.ShapeDtypeStruct` leaves."""
    state = jax.eval_shape(self._init, jax.random.key(0))
    return state, jax.eval_shape(lambda: empty_replay(self.config, self.spec))

  def lower(self) -> jax.stages.Lowered:
    """Lowers the epoch for the state and replay at hand or, before `start`, for those of the configuration."""
    arrays = self.devices.shapes(self.shapes) if self.state is None else (self.state, self.replay)
    counts = {name: jax.ShapeDtypeStruct((), np.int32) for name in self.phases}
    return self._epoch.lower(*arrays, counts)

  def compile(self) -> None:
    """Compiles the epoch."""
    self.epoch = self.lower().compile()

  def check_kernels(self) -> None:
    """Checks that the kernels that the configuration asks for run on the device.

    Raises:
      UserError: if they do not.
    """
    precision = self.config.precision
    for name, other in (("kernels", "xla"), ("convolution", "lax")):
      if getattr(precision, name) == "pallas" and not kernels.runs_here():
        raise UserError(
          f"precision.{name}=pallas needs a CUDA GPU of compute capability 8.0 or newer: take auto or {other}"
        )
    if precision.convolution == "pallas" and precision.kernels == "xla":
      raise UserError("precision.convolution=pallas needs precision.kernels=auto or pallas")

  def start(self, states: Sequence[TrainState], replays: Sequence[ReplayState]) -> None:
    """Copies state and replay of each run to its device.

    Raises:
      UserError: as `check_kernels`, or if a replay has frames of another size or actions that the model does not have.
    """
    self.check_kernels()
    for replay in replays:
      size, num_actions = math.prod(self.spec.observation_shape), self.model.spec.num_actions
      if replay.frames.shape[-1] != size:
        raise UserError(f"the replay has frames of {replay.frames.shape[-1]} numbers, the environment of {size}")
      if (largest := int(np.max(replay.actions))) >= num_actions:
        raise UserError(f"action {largest} in the replay must lie in 0..{num_actions - 1}")
    with self._announce(Operation.START):
      self.state = self.devices.to_devices(states)
      self.replay = self.devices.to_devices(replays)

  def add(self, chunks: Sequence[Chunk | None]) -> None:
    """Adds a chunk of steps to the replay of each run; None adds nothing."""
    given = [chunk for chunk in chunks if chunk is not None]
    if not given:
      return
    nothing = jax.tree.map(np.zeros_like, given[0])
    with self._announce(Operation.ADD):
      distributed = self.devices.to_devices([chunk or nothing for chunk in chunks])
      self.replay = self._add(self.replay, distributed)

  def update(self, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Runs updates, phase by phase.

    Args:
      counts: updates by phase; a phase that is missing has none. Those of a group fit together; see `training.order`.

    Returns:
      For each run, by phase, the sums of its metrics over its updates; NumPy arrays.

    Raises:
      UserError: for an unknown phase, a negative number, numbers that do not fit together, or before `start`.
    """
    for name, count in counts.items():
      if name not in self.phases:
        raise UserError(f"unknown phase {name!r}{nearest(name, self.phases)}")
      if count < 0:
        raise UserError(f"{count} updates of {name}: give 0 or more")
    if self.state is None:
      raise UserError("the learner has no state and no replay: call start first")
    counts = {name: counts.get(name, 0) for name in self.phases}
    for names in self.groups.values():
      own = {name: counts[name] for name in names}
      if misfit := misfit_together(self.config.training.order, own):
        raise UserError(f"updates of {', '.join(f'{name} {count}' for name, count in own.items())}: {misfit}")
    with self._announce(Operation.UPDATE, counts):
      self.state, sums = self.epoch(self.state, self.replay, traced(counts))
      return self.devices.each_to_host(sums)

  def watch(self, keys: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """Imagines from replay with the real actions and compares with what was real; see `dreams.make_watch`.

    Args:
      keys: data of a random key for each run.
    """
    with self._announce(Operation.WATCH):
      figures = self._watch(self.state.params, self.replay, self.devices.to_devices(keys))
      return self.devices.each_to_host(figures)

  def params(self, run: int = 0, names: Sequence[str] | None = None) -> dict[str, Params]:
    """Copies the parameters of a run on its device; those of all components if `names` is None."""
    params = self.state.params
    return self.devices.pick(params if names is None else {name: params[name] for name in names}, run)

  def snapshot(self, run: int = 0) -> tuple[TrainState, ReplayState]:
    """Copies state and replay of a run to NumPy arrays."""
    return self.devices.to_host(self.state, run), self.devices.to_host(self.replay, run)

  def updates(self, run: int = 0) -> dict[str, int]:
    """Number of updates of a run so far, by phase."""
    return _integers(self.devices.to_host(self.state.updates, run))

  def skipped(self, run: int = 0) -> dict[str, int]:
    """How many of the newest updates of a run in a row were skipped, by phase."""
    return _integers(self.devices.to_host(self.state.skipped, run))

  def follow(self) -> None:
    """Launches, in a process that does not lead, what the leader announces, until it stops.

    The arrays come from the leader. Those passed here only have the right shapes.
    """
    while True:
      operation, counts = hosts.receive()
      if operation == Operation.STOP:
        return
      if operation == Operation.START:
        state, replay = _zeros(self.shapes)
        self.start([state], [replay])
        self.compile()
      elif operation == Operation.ADD:
        streams, shape = self.config.env.num_envs, self.spec.observation_shape
        self.add([replay_lib.ChunkWriter(num_streams=streams, size=CHUNK_SLOTS, observation_shape=shape).flush()])
      elif operation == Operation.UPDATE:
        self.update({name: counts[name] for name in self.phases})
      else:
        self.watch([_zeros(jax.eval_shape(jax.random.key_data, jax.random.key(0)))])
      # Collectives of two programs must not overlap.
      jax.block_until_ready((self.state, self.replay))


def empty_replay(config: Config, spec: EnvSpec) -> ReplayState:
  """Returns the replay of a run before its first step."""
  slots = -(-(config.replay.capacity + config.replay.final_frames) // config.env.num_envs)
  return replay_lib.init(
    num_streams=config.env.num_envs,
    slots_per_stream=max(slots, CHUNK_SLOTS),
    observation_shape=spec.observation_shape,
  )


def traced(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
  """Returns numbers of updates as data of the epoch, so that one compilation serves all numbers."""
  return {name: np.asarray(count, np.int32) for name, count in counts.items()}


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _integers(counts: Mapping[str, np.ndarray]) -> dict[str, int]:
  return {name: int(count) for name, count in counts.items()}
