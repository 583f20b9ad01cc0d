"""Fixtures of the fault tests: snapshots of directory trees, and command lines that are run in forks of one process."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest

PROGRAMS = pathlib.Path(__file__).parents[2] / "experiments"
LIMIT = 30
"""Seconds after which a command counts as hanging."""

DRIVER = """
import json, os, runpy, signal, sys, time, traceback
import jedi_jax.training.loop, jedi_jax.sweep, jedi_jax.evaluation.report
import jedi_jax.interop.diamond, jedi_jax.inspection.film, orbax.checkpoint
programs, limit, results, cases = json.load(sys.stdin)
outcomes = []
for i, (program, argv) in enumerate(cases):
  out, err = (os.path.join(results, f"{i}.{kind}") for kind in ("out", "err"))
  sys.stdout.flush()
  child = os.fork()
  if child == 0:
    status = 1
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    program = os.path.join(programs, f"{program}.py")
    sys.argv = [program, *argv]
    sys.path.insert(0, programs)
    try:
      runpy.run_path(program, run_name="__main__")
      status = 0
    except SystemExit as error:
      status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  stop = time.monotonic() + limit
  while True:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      status = os.waitstatus_to_exitcode(status)
      break
    if time.monotonic() > stop:
      os.killpg(child, signal.SIGKILL)
      os.waitpid(child, 0)
      status = "hang"
      break
    time.sleep(0.01)
  outcomes.append([status, *(open(name, errors="backslashreplace").read() for name in (out, err))])
json.dump(outcomes, sys.stdout)
"""


def picture(directory):
  """Returns mode, modification time and contents of everything below a directory, by relative path."""
  seen = {}
  for folder, folders, files in os.walk(directory, followlinks=False):
    for name in (*folders, *files):
      path = os.path.join(folder, name)
      state = os.lstat(path)
      contents = None
      if stat.S_ISREG(state.st_mode):
        try:
          with open(path, "rb") as file:
            contents = file.read()
        except PermissionError:  # A file that cannot be read cannot have been changed.
          contents = state.st_size
      elif stat.S_ISLNK(state.st_mode):
        contents = os.readlink(path)
      seen[os.path.relpath(path, directory)] = (oct(state.st_mode), state.st_mtime_ns, contents)
  return seen


@pytest.fixture(scope="session")
def tree():
  """Takes a snapshot of a directory, including modes and times."""
  return picture


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
  """Runs command lines (program, flags) in a directory and returns [status or 'hang', stdout, stderr] of each.

  One process imports the libraries and forks for every command line, since imports take seconds.
  """

  def run(cases, directory):
    results = tmp_path_factory.mktemp("results")
    done = subprocess.run(
      [sys.executable, "-W", "ignore", "-c", DRIVER],
      input=json.dumps([str(PROGRAMS), LIMIT, str(results), cases]),
      capture_output=True, text=True, cwd=directory, timeout=LIMIT * len(cases) + 60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)

  return run
