"""Acting: the policy that collects, the device that evaluates it, and threads that step environments in parallel."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from jedi_jax import config as config_lib
from jedi_jax.agent import make_act
from jedi_jax.config import Config
from jedi_jax.errors import UserError
from jedi_jax.models.base import Build, Model
from jedi_jax.models.build import build as build_model
from jedi_jax.training.learner import Learner
from jedi_jax.types import EnvSpec

T = TypeVar("T")


class Actor:
  """The policy that collects, one compiled program for all runs.

  With `collect.overlap` the host's CPU evaluates it while the device trains, in float32, which is faster on a CPU than
  bfloat16.

  Args:
    config: of the runs.
    spec: of their environments.
    model: of one run; not mapped over runs, since each run acts by itself.
    build: builds the model for the CPU; see `Learner`.

  Attributes:
    model: the model whose policy acts.
    act: (parameters as `to_device` returns them, observations, state, restart, key, count, epsilon) -> (actions,
      state), compiled.

  Raises:
    UserError: if `collect.overlap` is set and JAX has no CPU backend.
  """

  def __init__(self, config: Config, spec: EnvSpec, model: Model, *, build: Build = build_model):
    self._cpu_device = _cpu() if config.collect.overlap else None
    self.model = model
    if self._cpu_device is not None:
      settings = {"precision.compute_dtype": "float32", "precision.convolution": "lax", "precision.kernels": "xla"}
      self.model = build(config_lib.override(config, settings), spec)
    self.act = jax.jit(make_act(self.model, max_hold=config.collect.epsilon_hold))

  def device_context(self) -> contextlib.AbstractContextManager[Any]:
    """A context whose new arrays are on the device that evaluates the policy."""
    return contextlib.nullcontext() if self._cpu_device is None else jax.default_device(self._cpu_device)

  def params(self, learner: Learner, run: int) -> Any:
    """Copies the parameters of a run's policy, on the run's device."""
    return learner.params(run, ("encoder", "actor_critic"))

  def to_device(self, params: Any) -> Any:
    """Moves what `params` returned to the device that evaluates the policy; may wait for it."""
    return params if self._cpu_device is None else jax.device_put(params, self._cpu_device)


def _cpu() -> jax.Device:
  """Returns the CPU device of this process.

  Raises:
    UserError: if JAX_PLATFORMS excludes it.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    raise UserError(
      "collect.overlap needs the CPU as well as the accelerator, and JAX_PLATFORMS excludes it: "
      f"set JAX_PLATFORMS={jax.config.values['jax_platforms']},cpu"
    ) from None


class _StoppedError(Exception):
  """Ends the remaining tasks."""


@contextlib.contextmanager
def run_in_threads(tasks: Sequence[Callable[[Callable[[], None]], T]]) -> Iterator[list[Future[T]]]:
  """A context in which each task runs in a thread of its own; all have ended when it exits.

  Emulators, compiled programs and devices release Python's lock, so the threads run in parallel.

  Args:
    tasks: each takes a function to call between its steps, which raises once an exception has left the context.

  Yields:
    The futures of their results, in order.
  """
  stop = threading.Event()

  def check() -> None:
    if stop.is_set():
      raise _StoppedError

  with ThreadPoolExecutor(max_workers=max(len(tasks), 1)) as pool:
    try:
      yield [pool.submit(task, check) for task in tasks]
    except BaseException:
      stop.set()
      raise
