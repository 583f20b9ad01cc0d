"""A SLURM of this machine alone: munged, slurmctld, and two nodes by `slurmd -N`, without accounting."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time

PROGRAMS = ("unshare", "munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun")

CONFIGURATION = """
ClusterName=jedi
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
KillWait=20
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=2,requeue_delay=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n1,n2 MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF
"""


def missing():
  """Why SLURM cannot be started here; None if it can."""
  if os.geteuid() != 0:
    return "starting SLURM needs root"
  found = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
  lacking = [name for name in PROGRAMS if not shutil.which(name, path=found)]
  return f"SLURM is not installed ({', '.join(lacking)} missing): apt-get install slurm-wlm munge" if lacking else None


def _free_ports(count):
  with contextlib.ExitStack() as stack:
    probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
    return [probe.getsockname()[1] for probe in probes]


class Slurm:
  """The cluster; a context that starts and stops it.

  Args:
    folder: of its files.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.file = folder / "slurm.conf"
    self.environment = {
      "SLURM_CONF": str(self.file),
      "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    self._daemons: dict[str, subprocess.Popen] = {}
    self._up = False
    self._pending: dict[str, float] = {}

  def __enter__(self):
    host = socket.gethostname().split(".")[0]
    self.folder.chmod(0o755)
    (self.folder / "state").mkdir()
    for node in ("n1", "n2"):
      (self.folder / f"spool.{node}").mkdir()
    self.file.write_text(CONFIGURATION.format(host=host, ports=_free_ports(3), folder=self.folder))
    (self.folder / "hosts").write_text(f"127.0.0.1 localhost {host} n1 n2\n")
    key = self.folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    self._start(
      "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
      f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log",
      f"--seed-file={self.folder}/munge.seed",
    )  # fmt: skip
    self.until((self.folder / "munge.socket").exists, "munged has no socket")
    self._start("slurmctld", "-D", "-c")
    for node in ("n1", "n2"):
      self.start_node(node)
    self.until(lambda: self.states() == {"n1": "idle", "n2": "idle"}, "the nodes are not idle")
    self._up = True
    return self

  def __exit__(self, *_):
    self.call("scancel", "--user=root", check=False)
    self.until(lambda: not self.jobs(), "jobs are left", seconds=40, fail=False)
    for name in reversed(self._daemons):
      self._end(name)
    # What a killed node left.
    own = f"SLURM_CONF={self.file}".encode()
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
      with contextlib.suppress(OSError):
        if own in path.read_bytes().split(b"\0"):
          os.kill(int(path.parent.name), signal.SIGKILL)

  def _start(self, name, *argv, key=None):
    log = (self.folder / f"{key or name}.out").open("ab")
    # The names of the nodes are this machine's, for its daemons and their jobs only.
    script = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
    self._daemons[key or name] = subprocess.Popen(
      ["unshare", "--mount", "sh", "-c", script, "sh", shutil.which(name, path=self.environment["PATH"]), *argv],
      env={**os.environ, **self.environment}, stdout=log, stderr=log,
    )  # fmt: skip

  def _end(self, key, number=signal.SIGTERM):
    daemon = self._daemons[key]
    daemon.send_signal(number)
    try:
      daemon.wait(20)
    except subprocess.TimeoutExpired:
      daemon.kill()
      daemon.wait()

  def start_node(self, node):
    """Starts the daemon of a node."""
    self._start("slurmd", "-D", "-N", node, key=node)

  def kill_node(self, node):
    """Kills the daemon of a node, as a power failure would; its job's processes stay."""
    self._end(node, signal.SIGKILL)

  def call(self, *argv, check=True):
    """Calls a program of SLURM and returns its output."""
    done = subprocess.run(argv, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{argv}: {done.stderr}"
    return done.stdout

  def states(self):
    """The state of each node."""
    lines = self.call("sinfo", "--noheader", "--Node", "--format=%N %t", "--partition=main", check=False).splitlines()
    return dict(line.split() for line in lines)

  def jobs(self):
    """The state of each job, or task of an array, that waits or runs."""
    lines = self.call("squeue", "--noheader", "--array", "--format=%i %T", check=False).splitlines()
    return dict(line.split() for line in lines)

  def hurry(self):
    """Starts jobs that were queued again two seconds later; SLURM lets them wait for two minutes.

    A job that starts within the second of its end is killed: its new credential has the time of the revoked one.
    """
    now = time.monotonic()
    self._pending = {job: self._pending.get(job, now) for job, state in self.jobs().items() if state == "PENDING"}
    for job, since in self._pending.items():
      if now > since + 2:
        self.call("scontrol", "update", f"jobid={job}", "starttime=now", check=False)

  def until(self, condition, message, *, seconds=60, fail=True):
    """Waits for a condition."""
    stop = time.monotonic() + seconds
    while not condition():
      if self._up:
        self.hurry()
      if time.monotonic() > stop:
        assert not fail, f"{message} after {seconds} s: {self.states()}, {self.jobs()}"
        return False
      time.sleep(0.5)
    return True
