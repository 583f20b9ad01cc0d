"""Command-line programs: flags and exit statuses by absl, the compilation cache, several processes."""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import math
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import jax
from absl import app, flags, logging

from jedi_jax import runtime
from jedi_jax.errors import DisconnectedError, Interrupted, TrainingError, UserError
from jedi_jax.runs.interruption import INTERRUPTED_STATUS

T = TypeVar("T")

_IMPORT = flags.DEFINE_multi_string("import", [], "Module to import first, to register environments; may be repeated.")

USAGE_STATUS = 2
"""Exit status of a `UserError` or a wrong flag."""
FAILED_STATUS = 3
"""Exit status of a `TrainingError`."""
DISCONNECTED_STATUS = 76
"""Exit status of a `DisconnectedError`."""

_HEARTBEAT_SECONDS = 30
"""Silence of a process after which the others count it as gone."""


def enable_compilation_cache() -> str:
  """Enables JAX's compilation cache on disk, also of small programs, and returns its directory.

  What is configured already stays.
  """
  directory = jax.config.values["jax_compilation_cache_dir"]
  if not directory:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = str(pathlib.Path(root) / "jedi_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", directory)
  if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # JAX's default.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # Initialisation compiles many small programs.
  return directory


@dataclasses.dataclass(frozen=True)
class Processes:
  """This process's position among the processes that train together. By default there is one process.

  Attributes:
    detect: whether the cluster (SLURM, a TPU pod) provides the other values.
    coordinator: HOST:PORT of the first process.
    count: number of processes.
    index: index of this process, in [0, count).

  Raises:
    UserError: if some of coordinator, count and index are missing, or are given with `detect`, or are invalid.
  """

  detect: bool = False
  coordinator: str | None = None
  count: int | None = None
  index: int | None = None

  def __post_init__(self) -> None:
    given = {"--coordinator": self.coordinator, "--num_processes": self.count, "--process_id": self.index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
      return
    if self.detect:
      raise UserError(f"--distributed asks the cluster: leave out {', '.join(name for name in given)}")
    if self.coordinator is None or self.count is None or self.index is None:
      raise UserError(f"{' and '.join(missing)} missing: {', '.join(given)} go together")
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise UserError(f"--coordinator={self.coordinator} is not HOST:PORT of the first process")
    if not 0 <= self.index < self.count:
      raise UserError(f"--process_id={self.index} is not one of 0 to {self.count - 1} (--num_processes={self.count})")

  def connect(self) -> None:
    """Connects the processes by `jax.distributed`; must run before JAX initialises its devices.

    Raises:
      UserError: if there is no cluster, or the processes cannot connect.
    """
    initialize = functools.partial(
      jax.distributed.initialize,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
    )
    try:
      if self.detect:
        _catch_abort()
        initialize()
      elif self.coordinator is not None:
        _catch_abort()
        # Cluster detection could also restrict the local devices.
        initialize(self.coordinator, self.count, self.index, cluster_detection_method="deactivate")
    except ValueError:
      raise UserError(
        "--distributed found no cluster (SLURM, a TPU pod): give --coordinator, --num_processes and --process_id"
      ) from None
    except RuntimeError as error:
      raise UserError(f"the processes cannot connect ({str(error).splitlines()[0][:200]})") from None
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
      # On CPUs, epochs loaded from the cache hung in their collectives in two of two trials; compiled ones did not.
      jax.config.update("jax_enable_compilation_cache", False)

  def share(self, items: Sequence[T]) -> Sequence[T]:
    """Returns this process's contiguous share of items; the processes need not be connected.

    Raises:
      UserError: if the items cannot be shared evenly, or `detect` is set outside of SLURM.
    """
    index, count = self.index, self.count
    if self.detect:
      try:
        index, count = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
      except (KeyError, ValueError):
        raise UserError(
          "--distributed shares several runs among the tasks of SLURM, but there are none: "
          "give --coordinator, --num_processes and --process_id"
        ) from None
    if index is None or count is None:
      return items
    share, rest = divmod(len(items), count)
    if rest:
      raise UserError(
        f"{len(items)} runs cannot be shared out evenly among {count} processes: take a multiple of {count} runs"
      )
    return items[index * share : (index + 1) * share]


_GONE = "another process of the run is gone, or JAX failed: the lines above tell; the same command continues the run"


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_disconnected(number: int) -> None:
  """Ends the process; called within a call of `abort`, in any thread."""
  del number
  _end(DISCONNECTED_STATUS, _GONE)


def _catch_abort() -> None:
  """Gives the process a status and a line of its own where `jax.distributed` aborts it since another one is gone.

  JAX (0.10.2) cannot call a Python function instead, and Python's own handlers do not run within an abort.
  """
  libc = ctypes.CDLL(None)
  libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, type(_end_disconnected)]
  libc.signal(signal.SIGABRT, _end_disconnected)


def run(main: Callable[[], None], description: str) -> None:
  """Runs a program with absl flags; errors of this package become one line on stderr and an exit status.

  Args:
    main: the program, which reads its flags from `absl.flags.FLAGS`.
    description: text that `--help` prints above the flags.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    if any(word in ("-h", "-help", "--help", "--helpfull") for word in argv[1:]):
      # absl's own help exits with status 1.
      print(f"{description.strip()}\n\nFlags:")
      folder = pathlib.Path(argv[0]).absolute().parent
      for name in flags.FLAGS.flags_by_module_dict():
        path = pathlib.Path(getattr(sys.modules.get(name), "__file__", None) or name).absolute()
        if path.parent == folder or path == pathlib.Path(__file__):  # Not the flags of other packages.
          print(flags.FLAGS.module_help(name))
      sys.exit(0)
    try:
      rest = flags.FLAGS(argv, known_only=False)
    except (flags.Error, ValueError, OSError) as error:  # OSError: absl's own flags, such as --flagfile.
      _exit(" ".join(str(error).split()))
    for name, flag in flags.FLAGS.flag_values_dict().items():
      if isinstance(flag, float) and not math.isfinite(flag):  # NaN passes absl's bounds.
        _exit(f"--{name}={flag} is not a finite number")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax logs every step of a save at INFO.
    if len(rest) > 1:
      _exit(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest

  def guarded(argv: Sequence[str]) -> None:
    del argv
    try:
      runtime.configure()
      _import(_IMPORT.value)
      main()
    except UserError as error:
      _exit(str(error))
    except TrainingError as error:
      _exit(str(error), FAILED_STATUS)
    except Interrupted as error:
      _exit(str(error), INTERRUPTED_STATUS)
    except DisconnectedError as error:
      _exit(f"{error}; the same command in all processes continues the run", DISCONNECTED_STATUS)
    except (Exception, KeyboardInterrupt):
      if not jax.distributed.is_initialized():
        raise
      traceback.print_exc()
      _leave(1)
    finally:
      _flush()

  app.run(guarded, flags_parser=parse)


def _import(names: Sequence[str]) -> None:
  """Imports modules, which are found from the current folder, too."""
  for name in names:
    try:
      sys.path.insert(0, os.getcwd())
      importlib.import_module(name)
    except ImportError as error:
      raise UserError(f"--import={name}: {error}") from None
    finally:
      sys.path.pop(0)


def _flush() -> None:
  """Flushes the standard streams; output for a full disk or closed pipe is discarded, as it would change the status."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _leave(status: int, message: str = "") -> NoReturn:
  """Ends one of several connected processes without waiting for the others; a message is its last line."""
  _flush()
  if jax.process_index() == 0:
    time.sleep(1.0)  # JAX aborts the others when this process ends; before, they end by themselves if it told them.
  _end(status, message)


def _end(status: int, message: str) -> NoReturn:
  """Ends the process at once. No other thread, such as JAX's that watches the connection, prints after the message."""
  with contextlib.suppress(OSError):  # A full disk must not change the status.
    out = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if message:
      os.write(out, _line(message).encode())
  os._exit(status)


def _exit(message: str, status: int = USAGE_STATUS) -> NoReturn:
  """Prints one line to stderr and exits; one of several connected processes without waiting for the others."""
  if jax.distributed.is_initialized():
    _leave(status, message)
  with contextlib.suppress(OSError):
    sys.stderr.write(_line(message))
    sys.stderr.flush()
  sys.exit(status)


def _line(message: str) -> str:
  return f"{pathlib.Path(sys.argv[0]).name}: {message}\n"
