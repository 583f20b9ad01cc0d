import os
import subprocess
import sys

import jax
import pytest

from jedi_jax import runtime


@pytest.fixture
def with_gpu(monkeypatch):
  monkeypatch.setattr(runtime, "has_gpu", lambda: True)
  monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_flags_are_added_and_those_of_the_user_stay(with_gpu, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_dump_to=there")
  runtime.configure()
  flags = os.environ["XLA_FLAGS"].split()
  assert flags[:2] == ["--xla_gpu_enable_triton_gemm=true", "--xla_dump_to=there"]
  assert sorted(flag.lstrip("-").split("=")[0] for flag in flags[2:]) == sorted(
    set(runtime.GPU_FLAGS) - {"xla_gpu_enable_triton_gemm"}
  )
  before = os.environ["XLA_FLAGS"]
  runtime.configure()
  assert os.environ["XLA_FLAGS"] == before


def test_other_versions_and_devices_are_left_alone(with_gpu, monkeypatch):
  monkeypatch.setattr(jax, "__version_info__", (9, 1, 0))
  runtime.configure()
  assert "XLA_FLAGS" not in os.environ
  monkeypatch.undo()
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  before = os.environ.get("XLA_FLAGS")
  assert not runtime.has_gpu()
  runtime.configure()
  assert os.environ.get("XLA_FLAGS") == before


def test_xla_knows_the_flags():
  flags = " ".join(f"--{name}={value}" for name, value in runtime.GPU_FLAGS.items())
  code = "import jax; print(jax.numpy.arange(3).sum())"
  environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "3"
