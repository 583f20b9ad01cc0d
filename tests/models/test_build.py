import types

import jax
import pytest

from jedi_jax import envs
from jedi_jax.config import make_config, override
from jedi_jax.models import build


@pytest.mark.parametrize(
  ("convolution", "dtype", "fused"),
  [("auto", "float32", False), ("auto", "bfloat16", True), ("pallas", "float32", True), ("lax", "bfloat16", False)],
)
def test_convolutions_are_fused_in_bfloat16(convolution, dtype, fused):
  settings = {"precision.convolution": convolution, "precision.compute_dtype": dtype}
  config = override(make_config(env="catch", preset="debug"), settings)
  assert build._compute(config, packed=False).fused_convolution == fused


@pytest.mark.parametrize(
  ("platform", "gigabytes", "packed", "chunk"),
  [("cpu", 128, False, 64), ("gpu", 8, False, 0), ("gpu", 6, False, 208), ("gpu", 24, True, 208), ("gpu", 60, True, 0)],
)
def test_frames_are_encoded_at_once_where_memory_allows(platform, gigabytes, packed, chunk, monkeypatch):
  stats = {"bytes_limit": gigabytes * 2**30}
  device = types.SimpleNamespace(platform=platform, compute_capability="7.0", memory_stats=lambda: stats)
  given = {}
  learned = build.codecs.learned
  monkeypatch.setattr(build.codecs, "learned", lambda *args, **kwargs: given.update(kwargs) or learned(*args, **kwargs))
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  build.build(make_config(env="catch", preset="debug"), envs.spec("catch"), packed=packed)
  assert given["chunk"] == chunk
