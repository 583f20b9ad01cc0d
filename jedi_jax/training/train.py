"""Trains runs: checks the arguments, opens the directories and runs the loop."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import jax

from jedi_jax import config as config_lib
from jedi_jax import datasets, envs
from jedi_jax.config import Config
from jedi_jax.datasets import Dataset
from jedi_jax.errors import TrainingError, UserError
from jedi_jax.models.base import Build
from jedi_jax.models.build import build as build_model
from jedi_jax.runs import checkpoint, loggers, workdir
from jedi_jax.runs.console import Console
from jedi_jax.runs.interruption import Interruption
from jedi_jax.training import hosts
from jedi_jax.training.acting import Actor
from jedi_jax.training.learner import Learner
from jedi_jax.training.loop import OnEpoch, Trainer, UnevenError
from jedi_jax.training.memory import check_replay
from jedi_jax.training.parallel import Devices
from jedi_jax.types import EnvSpec

_FOLLOWERS_MARGIN = 60.0  # Seconds beyond the grace in which the first process may finish its writes.


def train(
  config: Config,
  directory: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  devices: Devices | None = None,
  console: Console | None = None,
  interruption: Interruption | None = None,
  build: Build = build_model,
  on_epoch: OnEpoch | None = None,
  log: Sequence[str] = ("tensorboard",),
  data: Dataset | None = None,
) -> dict[str, Any]:
  """Trains a run to its end, or continues it from its newest checkpoint.

  Args:
    config: the configuration.
    directory: the run's working directory.
    overwrite: starts over in a directory that holds a run.
    devices: to train on; all if None. They may be those of several processes that `jax.distributed` connects, each of
      which makes the same call. The first process has the environments and the files.
    console: where progress is printed; standard output if None.
    interruption: can stop the run; nothing does if None.
    build: (config, spec, packed=False) -> `Model`; builds a model of one's own.
    on_epoch: called after each epoch, before its checkpoint; an exception ends the run. A resumed run repeats the
      epochs after its last checkpoint.
    log: loggers beside metrics.jsonl, a subset of 'tensorboard' and 'wandb' (Weights & Biases).
    data: recorded episodes to train on, without an environment and evaluations; then `config` is that of
      `datasets.make_config`.

  Returns:
    The contents of result.json; an empty dictionary in a process that is not the first.

  Raises:
    UserError: if the arguments, the directory or the devices do not fit one another; nothing is overwritten then.
    TrainingError: if losses or gradients were not finite in too many updates in a row.
    Interrupted: if the run was stopped.
    DisconnectedError: as `train_packed`.
  """
  [result] = train_packed(
    [config],
    [directory],
    overwrite=overwrite,
    devices=devices,
    console=console,
    interruption=interruption,
    build=build,
    on_epoch=on_epoch,
    log=log,
    data=data,
  )
  return result


@hosts.naming_losses()
def train_packed(
  configs: Sequence[Config],
  directories: Sequence[str | os.PathLike[str]],
  *,
  overwrite: bool = False,
  devices: Devices | None = None,
  console: Console | None = None,
  interruption: Interruption | None = None,
  build: Build = build_model,
  on_epoch: OnEpoch | None = None,
  log: Sequence[str] = ("tensorboard",),
  data: Dataset | None = None,
) -> list[dict[str, Any]]:
  """Trains several runs in one program, each as it would train alone, or continues them.

  Finished runs stay as they are. Runs whose checkpoints are at different epochs train in groups, one after the other.

  Args:
    configs: one configuration a run; they differ in the seed and the game only. Games with different numbers of
      actions need the same `env.action_slots`.
    directories: the runs' working directories, all different.
    overwrite: starts over in directories that hold a run.
    devices: to train on; all if None. Several runs are spread over them and need devices of one process.
    console: where progress is printed; standard output if None.
    interruption: can stop the runs; nothing does if None.
    build: as in `train`.
    on_epoch: as in `train`, called for each run in turn; an exception ends all runs.
    log: as in `train`.
    data: as in `train`, of all runs.

  Returns:
    The contents of each result.json.

  Raises:
    UserError: as `train`.
    TrainingError: if losses or gradients of a run were not finite in too many updates in a row, after the others have
      finished.
    Interrupted: if the runs were stopped.
    DisconnectedError: if another process of the run ended or cannot be reached. A process that does not lead raises
      what the leader raised, without its message.
  """
  devices, interruption = devices or Devices(), interruption or Interruption()
  console = console or Console()
  if data is not None:
    for config in configs:
      datasets.check_config(config, data)
  specs = [envs.spec(config.env.name) if data is None else data.spec for config in configs]
  record = None if data is None else data.record()
  _check_pack(configs, directories, specs, devices)
  for config, spec in zip(configs, specs, strict=True):
    check_replay(config, spec, runs=max(len(configs) // devices.count, 1))
    envs.check_installed(config.env.name)
  checkpoint.import_orbax()
  loggers.check(log)
  leader = hosts.Leader(devices)
  # Built before anything is written, since it refuses sizes that do not fit.
  learner = Learner(configs[0], specs[0], devices.with_runs(len(configs)), build=build, leader=leader)
  learner.check_kernels()
  model = build(configs[0], specs[0]) if learner.devices.packed else learner.model
  actor = Actor(configs[0], specs[0], model, build=build)
  hosts.warm_up_collectives(devices)
  if devices.processes > 1 and jax.process_index() > 0:
    # The leader decides when to stop.
    interruption.margin = _FOLLOWERS_MARGIN
    learner.follow()
    return [{}]
  with contextlib.ExitStack() as stack:
    # First, so that a lock that is refused stops the other processes too.
    stack.enter_context(leader)
    for directory, config, spec in zip(directories, configs, specs, strict=True):
      # Before the file of the lock is written.
      if overwrite:
        workdir.refuse_saved_agent(directory)
      else:
        workdir.check(directory, config, spec, record)
      stack.enter_context(workdir.locked(directory))
    workdirs = [
      workdir.prepare(directory, config, spec, data=record, overwrite=overwrite)
      for directory, config, spec in zip(directories, configs, specs, strict=True)
    ]
    left = [own for own in workdirs if not _is_complete(own, console)]
    failures: list[str] = []
    while left:
      group = _least_advanced(left)
      if len(group) > devices.count:  # The others follow as a group of their own.
        group = group[: len(group) // devices.count * devices.count]
      if len(group) != learner.devices.runs:
        own = Devices(devices.devices[:1]) if len(group) == 1 else devices.with_runs(len(group))
        learner = Learner(configs[0], specs[0], own, build=build, leader=leader)
      try:
        with Trainer(
          group,
          learner=learner,
          actor=actor,
          model=model,
          console=console,
          interruption=interruption,
          on_epoch=on_epoch,
          log=log,
          data=data,
        ) as trainer:
          trainer.run_to_end()
      except UnevenError:
        continue
      except TrainingError as error:
        failures.append(str(error))
      left = [own for own in left if own not in group]
  if failures:
    raise TrainingError("; ".join(failures))
  return [workdir.read_json(own.result) for own in workdirs]


def _is_complete(own: workdir.Workdir, console: Console) -> bool:
  if own.result.exists():
    console.log(f"{own.path} is complete; --overwrite starts it over")
    return True
  return False


def _least_advanced(workdirs: Sequence[workdir.Workdir]) -> list[workdir.Workdir]:
  """Returns the directories whose newest checkpoints have the lowest number."""
  numbers = [checkpoint.newest(own.checkpoints / "latest") or 0 for own in workdirs]
  return [own for own, number in zip(workdirs, numbers, strict=True) if number == min(numbers)]


def _check_pack(
  configs: Sequence[Config],
  directories: Sequence[str | os.PathLike[str]],
  specs: Sequence[EnvSpec],
  devices: Devices,
) -> None:
  """Refuses runs that cannot share a program."""
  if len(configs) > 1 and devices.processes > 1:
    raise UserError("several runs cannot share a program over connected processes: give each process its own runs")
  if len({os.path.abspath(directory) for directory in directories}) < len(configs):
    raise UserError("two runs have the same directory: give each its own")
  same = {"seed": 0, "env.name": configs[0].env.name}
  slots = {config.env.action_slots or spec.num_actions for config, spec in zip(configs, specs, strict=True)}
  for config in configs[1:]:
    different = config_lib.differences(config_lib.override(configs[0], same), config_lib.override(config, same))
    if different:
      raise UserError(f"packed runs differ in seed and game only, not in {'; '.join(different)}")
  if len({spec.observation_shape for spec in specs}) > 1:
    raise UserError("packed games must have observations of one shape")
  most = max(spec.num_actions for spec in specs)
  if len(slots) > 1:
    raise UserError(f"packed games have different numbers of actions: set --set=env.action_slots={most}")
  if max(slots) < most:
    raise UserError(f"env.action_slots={max(slots)} is too small for the {most} actions of a packed game")
