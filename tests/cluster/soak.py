"""A sweep that is killed, stopped, starved of disk and continued many times must end as an undisturbed one.

`python soak.py FOLDER HARMS SEED GAMES SEEDS [path=value]...` prints what happened as JSON; its status is 1 with a
reason if a promise of docs/reliability.md is broken. After SOAK_SECONDS it pauses; the same folder continues. The
libraries are imported once; the sweep and its runs are forks that begin where experiments/sweep.py and
experiments/train.py do. Runs have the tests' tiny configuration with the given settings.
"""

import contextlib
import ctypes
import io
import json
import os
import pathlib
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback

TESTS = pathlib.Path(__file__).parents[1]
PROGRAMS = TESTS.parent / "experiments"
sys.path[:0] = [str(TESTS), str(TESTS / "faults"), str(TESTS.parent)]
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")

import conftest  # noqa: E402 - it sets the environment of JAX.
import victim  # noqa: E402
from absl import app, flags  # noqa: E402
from comparison import Broken, compare  # noqa: E402

from jedi_jax import sweep  # noqa: E402
from jedi_jax.errors import UserError  # noqa: E402
from jedi_jax.runs import checkpoint  # noqa: E402

ROOM = 64 << 20
STATUSES = {0, 2, 75, 130, -signal.SIGTERM, -signal.SIGKILL}
"""A sweep or a run ends with no others; before it listens to signals, they end it."""
MARKERS = ("<epoch>", "<saving>", "<evaluating>")


KINDS = ("kill all", "kill run", "kill sweep", "stop", "stop run", "disk", "read-only", "clock")


class Paused(Exception):
  """The time is over; the same folder continues."""


# ---- Forks of this process as programs ----


def obey_permissions():
  """Takes the right from the superuser to write where the permissions forbid it."""
  if os.geteuid() == 0:
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(head, data) == 0:
      for i in (0, 1):  # Effective and permitted; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
        data[i] &= ~0b110
      libc.capset(head, data)


class Fork:
  """A fork that runs a program, with the part of `subprocess.Popen` that `sweep.Pool` uses."""

  notes = pathlib.Path()
  clock = pathlib.Path()

  def __init__(self, argv, stdout, stderr=None, process_group=0):
    del stderr, process_group
    self.returncode = None
    sys.stdout.flush()
    self.pid = os.fork()
    if self.pid:
      return
    status = 1
    try:
      os.setpgid(0, 0)
      if argv[1].endswith("sweep.py"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: it stops when the soak is killed.
      for number, handler in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, handler)
      signal.set_wakeup_fd(-1)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      os.dup2(stdout.fileno(), 1)
      os.dup2(stdout.fileno(), 2)
      for name in list(flags.FLAGS):  # Those of the sweep, which forks its runs.
        if flags.FLAGS.find_module_defining_flag(name).endswith("sweep.py"):
          delattr(flags.FLAGS, name)
      app._register_and_parse_flags_with_usage.done = False
      sys.argv = argv[1:]
      runpy.run_path(argv[1], run_name="__main__")
      status = 0
    except SystemExit as error:
      status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
      status = 130
    except BaseException:
      with (self.notes / "tracebacks").open("a") as file:
        traceback.print_exc(file=file)
    with contextlib.suppress(Exception):
      with (self.notes / "statuses").open("a") as file:
        file.write(f"{pathlib.Path(argv[1]).name} {status}\n")
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status)

  def poll(self):
    if self.returncode is None:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid:
        self.returncode = os.waitstatus_to_exitcode(status)
    return self.returncode

  def wait(self, timeout=None):
    stop = time.monotonic() + (timeout or 1e9)
    while self.poll() is None:
      if time.monotonic() > stop:
        raise subprocess.TimeoutExpired("fork", timeout)
      time.sleep(0.01)
    return self.returncode

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def children(self):
    """Returns descriptors of the children, which mean no other process later; this fork starts and reaps none after."""
    self.send_signal(signal.SIGSTOP)
    with contextlib.suppress(OSError):
      pids = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
      return [os.pidfd_open(int(pid)) for pid in pids]
    return []


def prepare():
  """Makes this process fit to be forked: runs print markers, have a clock that jumps, and obey permissions."""
  sweep.subprocess = Forked
  victim.mark()
  checkpoint.import_orbax()
  true_time = time.time

  def jumping():
    with contextlib.suppress(OSError, ValueError):
      return true_time() + float(Fork.clock.read_text())
    return true_time()

  time.time = jumping


class Forked:
  """Stands for the module `subprocess` in `jedi_jax.sweep`."""

  Popen, STDOUT, TimeoutExpired = Fork, subprocess.STDOUT, subprocess.TimeoutExpired


# ---- The sweep and what is done to it ----


class Soak:
  """Sweeps in a folder, one after the other, until enough was done to them."""

  def __init__(self, folder, games, seeds, pick, settings):
    self.folder, self.games, self.seeds, self.pick = folder, games, seeds, pick
    tiny = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in conftest._TINY.items()}
    self.settings = tuple(f"{name}={value}" for name, value in {**tiny, **settings}.items())
    self.done, self.statuses = dict.fromkeys(KINDS, 0), {}
    self.starts = self.rounds = self.alone = self.seconds = 0
    self.finished, self.process, self.orphans, self.out = set(), None, [], folder / "undisturbed"
    self.memory = folder / "soak.json"
    if self.memory.exists():
      vars(self).update(json.loads(self.memory.read_text()))

  def plan(self, out=None):
    arguments = {"variants": ["jedi"], "preset": "debug", "overrides": self.settings}
    return sweep.plan(out or self.out, games=self.games, seeds=self.seeds, **arguments)

  def start(self):
    texts = [f"--set={text}" for text in self.settings]
    argv = [sys.executable, str(PROGRAMS / "sweep.py"), f"--games={','.join(self.games)}", f"--seeds={self.seeds}"]
    argv += ["--preset=debug", f"--out={self.out}", "--interval=0.2", *texts]
    self.starts += 1
    self.marks = self.count()
    self.log = self.out / "logs" / "sweep"
    with contextlib.suppress(OSError):
      self.log.parent.mkdir(parents=True, exist_ok=True)
    writable = os.access(self.log if self.log.exists() else self.log.parent, os.W_OK)
    with open(self.log if writable else os.devnull, "ab") as log:  # Where the disk is full, as the logs of the runs.
      self.process = Fork(argv, log)

  def count(self):
    """Markers in the logs of the runs so far."""
    texts = [path.read_text(errors="replace") for path in (self.out / "logs").glob("*.log")]
    return {marker: sum(text.count(marker) for text in texts) for marker in MARKERS}

  def ended(self):
    """Notes the end of the sweep, if it has ended."""
    if self.process is None or (status := self.process.poll()) is None:
      return False
    self.statuses[str(status)] = self.statuses.get(str(status), 0) + 1
    if status not in STATUSES:
      raise Broken(f"the sweep ended with status {status}")
    self.process = None
    return True

  def check(self):
    """What holds at each moment: no program failed in another way, the table is true, and nothing finished is lost."""
    notes = self.folder / "statuses"
    for line in notes.read_text().splitlines() if notes.exists() else ():
      if int(line.split()[1]) not in STATUSES:
        raise Broken(f"{line}: {(self.folder / 'tracebacks').read_text()[-3000:]}")
    if (self.folder / "tracebacks").exists():
      raise Broken((self.folder / "tracebacks").read_text()[-3000:])
    try:
      statuses = [sweep.run_status(run) for run in self.plan()]
    except UserError as error:
      raise Broken(f"the table is not true: {error}") from None
    finished = {str(status.run.workdir) for status in statuses if status.name == "finished"}
    if self.finished - finished:
      raise Broken(f"no longer finished: {self.finished - finished}")
    self.finished = finished
    return len(finished) == len(statuses)

  def moment(self):
    """Waits for a random moment; returns whether the sweep still runs."""
    marker, limit = self.pick.choice((*MARKERS, "<epoch>", None)), time.monotonic() + 60
    number = self.marks.get(marker, 0) + self.pick.randrange(1, 6)
    later = self.pick.uniform(0, 0.2 if marker else 8)
    while marker and self.process.poll() is None and time.monotonic() < limit and self.count()[marker] < number:
      time.sleep(0.02)
    stop = time.monotonic() + later
    while self.process.poll() is None and time.monotonic() < stop:
      time.sleep(0.01)
    self.marks = self.count()
    return self.process.poll() is None

  def signal_runs(self, number):
    """Sends a signal to the running runs; returns whether there was one."""
    children = self.process.children()
    for run in children:
      signal_and_close(run, number)
    self.process.send_signal(signal.SIGCONT)
    return bool(children)

  def harm(self, disk):
    """Does one thing to the running sweep, and undoes it."""
    kinds = [*self.done, "kill all", "kill all", "stop"]
    kind = self.pick.choice([kind for kind in kinds if kind != "disk" or disk])
    if kind == "kill all":
      for run in self.process.children():
        signal_and_close(run, signal.SIGKILL)
      self.process.kill()
      self.process.wait(60)
    elif kind == "kill run":
      if not self.signal_runs(signal.SIGKILL):
        return
    elif kind == "kill sweep":
      self.orphans += self.process.children()
      self.process.kill()
      self.process.wait(60)
    elif kind == "stop":
      self.process.send_signal(self.pick.choice((signal.SIGTERM, signal.SIGINT)))
      self.process.wait(90)
    elif kind == "stop run":
      if not self.signal_runs(signal.SIGTERM):
        return
    elif kind == "disk":
      space = os.statvfs(self.out)
      left = self.pick.choice((0, 0, 20_000, 100_000, 500_000))
      filler = self.out / "others"
      with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for _ in range(max(space.f_bavail * space.f_frsize - left, 0) >> 12):
          file.write(b"x" * 4096)
      self.pause()
      filler.unlink(missing_ok=True)
    elif kind == "read-only":
      places = [path for path, _, _ in os.walk(self.out)]
      self.permit(self.pick.sample(places, min(len(places), self.pick.randrange(1, 6))), 0o555)
      self.pause()
      self.permit([path for path, _, _ in os.walk(self.out)], 0o755)
    elif kind == "clock":
      Fork.clock.write_text(str(self.pick.choice((-1, 1)) * self.pick.choice((1, 60, 3600, 86400, 10 * 365 * 86400))))
      for path in [os.path.join(place, name) for place, _, names in os.walk(self.out) for name in names]:
        with contextlib.suppress(OSError):
          if self.pick.random() < 0.5:
            os.utime(path, (self.pick.choice((0, 1e9, 4e9)),) * 2)
    self.done[kind] += 1

  @staticmethod
  def permit(paths, mode):
    for path in paths:
      with contextlib.suppress(FileNotFoundError):
        os.chmod(path, mode)

  def pause(self):
    stop = time.monotonic() + self.pick.uniform(0.1, 3)
    while time.monotonic() < stop and self.process.poll() is None:
      time.sleep(0.02)

  def reap(self):
    """Sometimes ends the runs that were left behind by a killed sweep."""
    for run in list(self.orphans):
      if self.pick.random() < 0.5:
        signal_and_close(run, signal.SIGKILL)
        self.orphans.remove(run)

  def end_all(self):
    """Ends all processes."""
    if self.process is not None:
      self.orphans += self.process.children()
      self.process.kill()
    for run in self.orphans:
      signal_and_close(run, signal.SIGKILL)
    self.orphans = []

  def pause_if(self, stop, *, keep):
    """Ends all processes after the time `stop`; of the undisturbed runs only those that are finished are kept."""
    if time.monotonic() < stop:
      return
    self.done["kill all"] += keep and self.process is not None and self.process.poll() is None
    self.end_all()
    for run in () if keep else self.plan():
      if sweep.run_status(run).name != "finished":
        shutil.rmtree(run.workdir, ignore_errors=True)
    raise Paused

  def run(self, harms, disk, stop):
    """Harms sweeps `harms` times, or until the time `stop`; the same folder continues."""
    begin = time.monotonic()
    self.out = self.folder / "undisturbed"
    self.start()
    while not self.ended():
      time.sleep(0.05)
      self.pause_if(stop, keep=False)
    if not self.check():
      raise Broken(f"the undisturbed sweep did not end: {self.log.read_text()[-2000:]}")
    self.alone = self.alone or round(time.monotonic() - begin)
    undisturbed = self.plan()
    while sum(self.done.values()) < harms or not self.rounds:
      with mounted(self.folder / f"round_{self.rounds}", disk) as self.out:
        self.finished, self.last = set(), 0
        while not (self.check() and self.process is None):
          self.pause_if(stop, keep=True)
          if self.process is None:
            self.start()
          if sum(self.done.values()) < harms:
            if self.moment():
              self.harm(disk)
              self.reap()
          else:
            self.to_the_end(stop)
          self.ended()
        compare(undisturbed, self.plan(), self.folder)
      self.rounds += 1

  def to_the_end(self, stop):
    """Waits until the sweep ends, without the runs that were left behind."""
    self.last += 1
    if self.last > 10:
      raise Broken(f"the sweep does not end: {self.log.read_text(errors='replace')[-2000:]}")
    self.orphans, left = [], self.orphans
    for run in left:
      signal_and_close(run, signal.SIGKILL)
    while self.process.poll() is None:
      time.sleep(0.02)
      self.pause_if(stop, keep=True)


def signal_and_close(run, number):
  """Sends a signal to a process by its descriptor."""
  with contextlib.suppress(ProcessLookupError):
    signal.pidfd_send_signal(run, number)
  os.close(run)


@contextlib.contextmanager
def mounted(path, disk):
  """A directory, on a small file system of its own if `disk` is true; it stays for a pause."""
  path.mkdir(exist_ok=True)
  if disk and not os.path.ismount(path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", path], check=True)
  pause = False
  try:
    yield path
  except Paused:
    pause = True
    raise
  finally:
    if disk and not pause:
      subprocess.run(["umount", "--lazy", path], check=True)


def can_mount(folder):
  """Returns whether this process may mount."""
  try:
    with mounted(folder / "mount", disk=True):
      return True
  except (OSError, subprocess.CalledProcessError):
    return False
  finally:
    (folder / "mount").rmdir()


def main():
  folder, harms, seed, games, seeds = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4], int(sys.argv[5])
  assert isinstance(sys.stdout, io.TextIOBase)
  folder.mkdir(parents=True, exist_ok=True)
  Fork.notes, Fork.clock = folder, folder / "clock"
  disk = can_mount(folder)
  obey_permissions()
  prepare()
  settings = dict(text.split("=", 1) for text in sys.argv[6:])
  soak = Soak(folder, games.split(","), seeds, random.Random(seed), settings)
  begin, broken, paused = time.monotonic(), "", False
  try:
    soak.run(harms, disk, begin + float(os.environ.get("SOAK_SECONDS", "inf")))
  except (Broken, subprocess.TimeoutExpired) as error:
    broken = str(error)
  except Paused:
    paused = True
  finally:
    soak.end_all()
  soak.seconds += round(time.monotonic() - begin)
  memory = {name: getattr(soak, name) for name in ("done", "statuses", "starts", "rounds", "alone", "seconds")}
  soak.memory.write_text(json.dumps(memory))
  about = {"seed": seed, "harms": sum(soak.done.values()), **memory, "runs of a sweep": len(soak.plan()), "disk": disk}
  print(json.dumps(about | {"paused": paused} | ({"broken": broken} if broken else {})))
  sys.exit(bool(broken))


if __name__ == "__main__":
  main()
