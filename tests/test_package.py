"""The package as a user imports it. Each test has a process of its own: imports last as long as the process."""

import subprocess
import sys
import textwrap

import jedi_jax

BLOCK = """
import sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {"envpool", "orbax", "tensorboardX", "PIL", "matplotlib"}:
      raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run(code, *args):
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_the_import_loads_nothing_else():
  loaded = run("""
    import sys
    before = set(sys.modules)
    import jedi_jax
    print(sorted({name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
  """)
  assert loaded.strip() == "['jedi_jax']"


def test_every_public_name_exists():
  assert set(jedi_jax.__all__) <= set(dir(jedi_jax))
  for name in jedi_jax.__all__:
    assert getattr(jedi_jax, name) is not None
  assert not hasattr(jedi_jax, "trainer")


WITHOUT = (
  BLOCK
  + """
import numpy as np
import jedi_jax
from jedi_jax import replay
from jedi_jax.ops import sampler

overrides = {"encoder.channels": (4, 4), "encoder.downsample": (True, True), "denoiser.channels": (4,),
             "reward_end.channels": (4,), "denoiser.conditioning_width": 8}
config = jedi_jax.make_config(env="catch", preset="debug", overrides=overrides)
spec = jedi_jax.envs.spec("catch")
learner = jedi_jax.Learner(config, spec, jedi_jax.training.parallel.Devices.take(1))
rng = np.random.default_rng(0)
episode = {
  "observations": rng.integers(256, size=(31, 24, 24, 3), dtype=np.uint8),
  "actions": rng.integers(3, size=30), "rewards": rng.normal(size=30), "ends": True,
}
learner.start([learner.init(seed=0)], [replay.from_episodes([episode])])
learner.lower()  # Traces the updates; compiling them takes long.
print(learner.updates()["denoiser"])

def refused(function, *args, **options):
  try:
    function(*args, **options)
  except jedi_jax.UserError as error:
    print(error)

refused(jedi_jax.envs.make, "catch", num_envs=1, seed=0)
# Before anything is removed.
refused(jedi_jax.train, config, sys.argv[1], overwrite=True)
jedi_jax.envs.register("still", spec, lambda **options: None)
refused(jedi_jax.train, jedi_jax.config.override(config, {"env.name": "still"}), sys.argv[1], overwrite=True)
"""
)


def test_a_model_is_built_without_emulators_checkpoints_and_loggers(tmp_path):
  (tmp_path / "result.json").write_text("precious")
  lines = run(WITHOUT, str(tmp_path)).splitlines()
  assert lines[0] == "0"
  for line, package in zip(lines[1:], ("envpool", "envpool", "orbax-checkpoint"), strict=True):
    assert f"pip install {package}" in line
  assert (tmp_path / "result.json").read_text() == "precious"
