"""Acting: what chooses the real steps of the runs, where it does so, and how they are taken side by side."""

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
from jedi_jax.models.build import build
from jedi_jax.training.parallel import Devices
from jedi_jax.types import EnvSpec

T = TypeVar("T")


class Actor:
  """The policy of collections, one program for all runs.

  With `collect.overlap` the host's CPU evaluates it, since the device is busy meanwhile; in float32, which a CPU
  computes faster than bfloat16.

  Args:
    config: of the runs.
    spec: of their environments.

  Attributes:
    model: whose policy it is.
    act: (parameters as `bring` returns them, observations, state, restart, key, count, epsilon) -> (actions, state),
      compiled.

  Raises:
    UserError: if the host's CPU is asked for and JAX does not have it, or for sizes that do not fit.
  """

  def __init__(self, config: Config, spec: EnvSpec):
    self._host = _host() if config.collect.overlap else None
    if self._host is not None:
      config = config_lib.override(config, {"precision.compute_dtype": "float32", "precision.convolution": "lax"})
    self.model = build(config, spec)  # Never mapped over runs: each run's steps are its own.
    self.act = jax.jit(make_act(self.model))

  def near(self) -> contextlib.AbstractContextManager[Any]:
    """A context whose new arrays are where the policy is evaluated."""
    return contextlib.nullcontext() if self._host is None else jax.default_device(self._host)

  def pick(self, devices: Devices, params: Any, run: int) -> Any:
    """Copies what the policy needs of a run's distributed parameters, on the run's device."""
    return devices.pick({name: params[name] for name in ("encoder", "actor_critic")}, run)

  def bring(self, params: Any) -> Any:
    """Brings what was picked to where the policy is evaluated, which may have to wait for it."""
    return params if self._host is None else jax.device_put(params, self._host)


def _host() -> jax.Device:
  """The CPU of this process.

  Raises:
    UserError: if JAX was told to do without.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    raise UserError(
      "collect.overlap needs the CPU beside the accelerator, and JAX_PLATFORMS leaves it out: "
      f"set JAX_PLATFORMS={jax.config.values['jax_platforms']},cpu"
    ) from None


class _StoppedError(Exception):
  """The others need not go on."""


@contextlib.contextmanager
def side_by_side(tasks: Sequence[Callable[[Callable[[], None]], T]]) -> Iterator[list[Future[T]]]:
  """A context in which each task runs in a thread of its own; at its end all have ended.

  Python's threads help where the time goes to emulators, compiled programs and devices, which release its lock.

  Args:
    tasks: each is given a function to call between its steps, which raises when the context was left by an exception.

  Yields:
    Their results to come, in the order of the tasks.
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
