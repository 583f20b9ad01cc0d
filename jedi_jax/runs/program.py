"""Settings of the process: the compilation cache, its place among processes, and how programs meet their user."""

import contextlib
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from absl import app, flags, logging

from jedi_jax.errors import Interrupted, TrainingError, UserError
from jedi_jax.runs.interruption import INTERRUPTED_STATUS

T = TypeVar("T")

USAGE_STATUS = 2
"""Exit status of a mistake in what the user asked for, or of something that the user can mend."""
FAILED_STATUS = 3
"""Exit status of a training whose numbers are no longer finite."""


def enable_compilation_cache() -> str:
  """Makes JAX keep compiled programs on disk, unless its cache is configured already; returns the directory."""
  directory = jax.config.values["jax_compilation_cache_dir"]
  if not directory:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = str(pathlib.Path(root) / "jedi_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", directory)
  return directory


@dataclasses.dataclass(frozen=True)
class Processes:
  """The processes that were started together, of which this is one; it is alone if nothing is said.

  Attributes:
    detect: whether the cluster is asked what the others say.
    coordinator: HOST:PORT at which the first process can be reached.
    count: how many they are.
    index: the place of this one, from 0.

  Raises:
    UserError: unless the cluster is asked, or all of the others are given, or nothing.
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
    """Makes JAX see the devices of all processes; to be called before it sees any.

    Raises:
      UserError: if no cluster is found, or the processes do not find one another.
    """
    try:
      if self.detect:
        jax.distributed.initialize()
      elif self.coordinator is not None:
        # What is said is enough; a cluster might restrict the devices besides.
        jax.distributed.initialize(self.coordinator, self.count, self.index, cluster_detection_method="deactivate")
    except ValueError:
      raise UserError(
        "--distributed finds no cluster (SLURM, a TPU pod): give --coordinator, --num_processes and --process_id"
      ) from None
    except RuntimeError as error:
      raise UserError(f"the processes do not find one another ({str(error).splitlines()[0][:200]})") from None
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
      # Seen twice in two: epochs read from the cache stood still in their collectives; compiled ones do not.
      jax.config.update("jax_enable_compilation_cache", False)

  def share(self, items: Sequence[T]) -> Sequence[T]:
    """Returns this process's contiguous share of what processes that do not communicate do side by side.

    Raises:
      UserError: if there is no equal share, or no cluster that tells which one this process is.
    """
    index, count = self.index, self.count
    if self.detect:
      try:
        index, count = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
      except (KeyError, ValueError):
        raise UserError(
          "--distributed shares several runs out among the tasks of SLURM, and finds none: "
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


def run(main: Callable[[], None], description: str) -> None:
  """Runs an absl program: flags are parsed, and a mistake of the user ends in one line and exit status 2.

  Args:
    main: the program; reads its flags from `absl.flags.FLAGS`.
    description: what `--help` prints above the flags.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    if any(word in ("-h", "-help", "--help", "--helpfull") for word in argv[1:]):
      # absl's own help flag would print while it is parsed, and exit with 1.
      print(f"{description.strip()}\n\nFlags:\n{flags.FLAGS.module_help(sys.modules['__main__'])}")
      sys.exit(0)
    try:
      rest = flags.FLAGS(argv, known_only=False)
    except (flags.Error, ValueError, OSError) as error:  # The last are of absl's own flags, such as --flagfile.
      _refuse(" ".join(str(error).split()))
    for name, flag in flags.FLAGS.flag_values_dict().items():
      if isinstance(flag, float) and not math.isfinite(flag):  # absl's bounds let what is no number pass.
        _refuse(f"--{name}={flag} is not a finite number")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save at level INFO.
    if len(rest) > 1:
      _refuse(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest

  def guarded(argv: Sequence[str]) -> None:
    del argv
    try:
      main()
    except UserError as error:
      _refuse(str(error))
    except TrainingError as error:
      _refuse(str(error), FAILED_STATUS)
    except Interrupted as stopped:
      _refuse(str(stopped), INTERRUPTED_STATUS)
    finally:
      _drain()

  app.run(guarded, flags_parser=parse)


def _drain() -> None:
  """Lets go of what a full disk or a closed pipe does not take, which would change the status at the very end."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _refuse(message: str, status: int = USAGE_STATUS) -> None:
  with contextlib.suppress(OSError):  # A log on a full disk; the status counts.
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
  sys.exit(status)
