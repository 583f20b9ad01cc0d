"""Hosts on one machine: network namespaces joined by a bridge, each with a name of its own; else the loopback."""

import contextlib
import os
import shutil
import subprocess

PORT = 4321


def run(command, *, check=True):
  return subprocess.run(command, shell=True, check=check, capture_output=True, text=True)


class Loopback:
  """Processes that share the machine's loopback; they cannot be parted."""

  parted = False

  def __init__(self, port):
    self.coordinator = f"127.0.0.1:{port}"

  def before(self, index):
    return ()


class Namespaces:
  """One network namespace for each host; a context that makes and removes them.

  Args:
    count: of hosts.
    folder: for the file of their names.
  """

  parted = True

  def __init__(self, count, folder):
    self._names = [f"jedi{os.getpid()}h{index}" for index in range(count)]
    self._hub = f"jedi{os.getpid()}hub"
    self._hosts = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"10.77.0.{i + 1} {name}" for i, name in enumerate(self._names))]
    self._hosts.write_text("\n".join(lines) + "\n")
    self.coordinator = f"{self._names[0]}:{PORT}"

  def __enter__(self):
    run(f"ip netns add {self._hub} && ip -n {self._hub} link add bridge type bridge && "
        f"ip -n {self._hub} link set bridge up")  # fmt: skip
    for i, name in enumerate(self._names):
      run(
        f"ip netns add {name} && ip -n {name} link set lo up && "
        f"ip -n {name} link add eth0 type veth peer name port{i} netns {self._hub} && "
        f"ip -n {name} address add 10.77.0.{i + 1}/24 dev eth0 && ip -n {name} link set eth0 up && "
        f"ip -n {self._hub} link set port{i} master bridge up"
      )
    return self

  def __exit__(self, *_):
    for name in (*self._names, self._hub):
      run(f"ip netns delete {name}", check=False)

  def before(self, index):
    """The command that starts another one on a host, in the same process."""
    name = self._names[index]
    script = f'hostname {name} && mount --bind {self._hosts} /etc/hosts && exec "$@"'
    return ("ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", script, "sh")

  def part(self, index):
    """Cuts a host off from all others."""
    run(f"ip -n {self._hub} link set port{index} down")

  def join(self, index):
    """Connects a host that was cut off."""
    run(f"ip -n {self._hub} link set port{index} up")


def allowed():
  """Why this machine cannot make namespaces; None if it can."""
  if os.geteuid() != 0:
    return "network namespaces need root"
  missing = [name for name in ("ip", "unshare", "mount", "hostname") if not shutil.which(name)]
  if missing:
    return f"network namespaces need {', '.join(missing)}"
  name = f"jedi{os.getpid()}try"
  done = run(f"ip netns add {name} && ip netns exec {name} unshare --uts --mount true && "
             f"ip -n {name} link add eth0 type veth peer name eth1", check=False)  # fmt: skip
  run(f"ip netns delete {name}", check=False)
  return None if done.returncode == 0 else f"this machine makes no network namespaces ({done.stderr.strip()})"


@contextlib.contextmanager
def network(count, folder, port):
  """Hosts in namespaces of their own where the machine allows it, else on the loopback."""
  if allowed():
    yield Loopback(port)
  else:
    with Namespaces(count, folder) as hosts:
      yield hosts
