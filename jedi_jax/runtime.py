"""Settings of the process: the persistent compilation cache, and how programs meet their user."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from jedi_jax.errors import UserError

USAGE_STATUS = 2
"""Exit status of a mistake in what the user asked for."""


def enable_compilation_cache() -> str:
  """Makes JAX keep compiled programs on disk, unless its cache is configured already; returns the directory."""
  directory = jax.config.values["jax_compilation_cache_dir"]
  if not directory:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = str(pathlib.Path(root) / "jedi_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", directory)
  return directory


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
    except flags.Error as error:
      _refuse(" ".join(str(error).split()))
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

  app.run(guarded, flags_parser=parse)


def _refuse(message: str) -> None:
  print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
  sys.exit(USAGE_STATUS)
