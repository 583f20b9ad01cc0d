"""Settings of XLA for GPUs, which have to be made before JAX starts."""

import importlib.util
import os
from collections.abc import Mapping

import jax

GPU_FLAGS: Mapping[str, str] = {
  # Loops become CUDA graphs, which launch their kernels without the host; convolutions of cuDNN interrupt them.
  "xla_gpu_enable_command_buffer": ("FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"),
  "xla_gpu_graph_min_graph_size": "1",
  # XLA would compile dozens of kernels for each small product to choose one; cuBLAS has them ready.
  "xla_gpu_enable_triton_gemm": "false",
}
"""Flags of XLA that `configure` sets, with their values."""

_VERSIONS = ((0, 10), (0, 11), (0, 12))
"""Versions of JAX that know these flags. XLA ends the process at one that it does not know."""


def configure() -> None:
  """Adds `GPU_FLAGS` to the environment variable `XLA_FLAGS` if a CUDA GPU is found.

  Flags that are set already stay. The programs of this repository call it; call it before the first use of JAX in your
  own. It does nothing on other devices, and under versions of JAX other than 0.10 to 0.12.
  """
  if not has_gpu() or jax.__version_info__[:2] not in _VERSIONS:
    return
  add_flags(GPU_FLAGS)


def add_flags(flags: Mapping[str, str]) -> None:
  """Adds flags to the environment variable `XLA_FLAGS`; those that are set already stay."""
  given = os.environ.get("XLA_FLAGS", "").split()
  names = {flag.lstrip("-").split("=")[0] for flag in given}
  added = [f"--{name}={value}" for name, value in flags.items() if name not in names]
  os.environ["XLA_FLAGS"] = " ".join([*given, *added])


def has_gpu() -> bool:
  """Whether JAX will use a CUDA GPU, as far as can be told without starting it."""
  platforms = os.environ.get("JAX_PLATFORMS", "") or "cuda"
  plugins = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
  return plugins and any(name in platforms.split(",") for name in ("cuda", "gpu")) and os.path.exists("/dev/nvidiactl")
