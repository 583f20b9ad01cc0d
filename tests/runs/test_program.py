import os
import subprocess
import sys

PROGRAM = """
import jax
from jedi_jax.runs import program

print(program.enable_compilation_cache())
for given in (None, 5.0, float("inf")):
  if given:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", given)
  program.enable_compilation_cache()
  print(jax.config.values["jax_persistent_cache_min_compile_time_secs"])
"""


def test_small_programs_are_cached_unless_a_time_is_configured(tmp_path):
  env = {name: value for name, value in os.environ.items() if "CACHE" not in name} | {"XDG_CACHE_HOME": str(tmp_path)}
  done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, check=True)
  assert done.stdout.split() == [str(tmp_path / "jedi_jax" / "xla"), "0.0", "5.0", "inf"]
