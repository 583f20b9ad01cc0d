import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.nn import blocks, chain
from jedi_jax.ops import fused_attention, fused_blocks, fused_convolution, images, kernels
from jedi_jax.ops.fused_convolution import Skip
from jedi_jax.ops.kernels import GroupNormSettings
from jedi_jax.types import Compute

MODE = "pallas" if kernels.runs_here() else "interpret"


def normal(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def plain_group_norm(x, affine, settings):
  """Group norm in float32, by the definition."""
  batch, height, width, channels = x.shape
  gain, shift = jnp.split(affine[:, settings.start : settings.start + 2 * channels].astype(jnp.float32), 2, axis=-1)
  groups = x.astype(jnp.float32).reshape(batch, height * width, -1, settings.group)
  centred = groups - groups.mean((1, 3), keepdims=True)
  normalised = centred / jnp.sqrt(jnp.square(centred).mean((1, 3), keepdims=True) + settings.epsilon)
  y = normalised.reshape(x.shape) * (settings.offset + gain[:, None, None]) + shift[:, None, None]
  return (jax.nn.silu(y) if settings.silu else y).astype(x.dtype)


def with_gradients(function, *arguments):
  """The value, and the gradients of its sum with random weights."""
  value, back = jax.vjp(function, *arguments)
  return value, back(normal(*value.shape, seed=9, dtype=value.dtype))


# Groups, positions and channels that are no powers of two are padded; one row of gains serves the whole batch.
@pytest.mark.parametrize(
  ("shape", "group", "rows", "start", "silu"),
  [
    ((2, 8, 8, 64), 32, 2, 0, True),
    ((2, 8, 8, 64), 32, 1, 0, False),
    ((3, 10, 10, 16), 16, 3, 8, True),
    ((2, 5, 7, 48), 48, 1, 3, True),
    ((2, 4, 4, 160), 32, 2, 64, False),
  ],
)
def test_group_norm_and_its_gradient(shape, group, rows, start, silu):
  settings = GroupNormSettings(group, 1e-5, 1.0, silu, MODE, start)
  x, affine = 1 + 2 * normal(*shape), normal(rows, start + 2 * shape[-1] + 5)
  value, gradients = with_gradients(lambda *args: kernels.group_norm(*args, settings), x, affine)
  expected, expected_gradients = with_gradients(lambda *args: plain_group_norm(*args, settings), x, affine)
  np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
  for actual, plain in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(actual, plain, rtol=1e-3, atol=3e-4)


def test_group_norm_in_bfloat16_computes_in_float32():
  settings = GroupNormSettings(32, 1e-5, 0.0, True, MODE)
  x, affine = (64 + 2 * normal(2, 8, 8, 32)).astype(jnp.bfloat16), normal(1, 64)
  value = kernels.group_norm(x, affine, settings)
  assert value.dtype == jnp.bfloat16
  expected = plain_group_norm(x.astype(jnp.float32), affine, settings)
  np.testing.assert_allclose(value.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("positions", "channels", "heads"), [(64, 32, 4), (100, 16, 2), (35, 12, 1)])
def test_attention_and_its_gradient(positions, channels, heads):
  qkv = normal(2, positions, 3 * channels)
  value, gradients = with_gradients(lambda qkv: kernels.attention(qkv, heads, MODE), qkv)
  reference = functools.partial(kernels.attention_reference, heads=heads)
  with jax.default_matmul_precision("highest"):
    expected, expected_gradients = with_gradients(reference, qkv)
  np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(gradients[0], expected_gradients[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("shape", "heads"), [((2, 8, 8, 48), 6), ((3, 5, 7, 20), 2), ((1, 10, 10, 12), 1)])
def test_attention_with_its_first_layer(shape, heads):
  x, kernel, bias = normal(*shape), normal(shape[-1], 3 * shape[-1]) / 4, normal(3 * shape[-1])
  value = fused_attention.attention(x, kernel, bias, heads, MODE)
  with jax.default_matmul_precision("highest"):
    expected = kernels.attention_reference(kernels.flat(x @ kernel + bias), heads)
  np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
  narrow = fused_attention.attention(*(y.astype(jnp.bfloat16) for y in (x, kernel, bias)), heads, MODE)
  assert narrow.dtype == jnp.bfloat16
  assert jnp.linalg.norm(narrow.astype(jnp.float32) - expected) / jnp.linalg.norm(expected) < 2e-2


def test_gradients_in_bfloat16_agree_with_those_of_float32():
  settings = GroupNormSettings(32, 1e-5, 1.0, True, MODE)
  x, affine, qkv = normal(2, 8, 8, 32), normal(2, 64), normal(2, 64, 48)
  for function, arguments in (
    (lambda x, affine: kernels.group_norm(x, affine, settings), (x, affine)),
    (lambda qkv: kernels.attention(qkv, 2, MODE), (qkv,)),
  ):
    narrow = [value.astype(jnp.bfloat16) for value in arguments]
    value, gradients = with_gradients(function, *narrow)
    expected, expected_gradients = with_gradients(function, *(value.astype(jnp.float32) for value in narrow))
    for actual, plain in zip((value, *gradients), (expected, *expected_gradients), strict=True):
      assert actual.dtype == jnp.bfloat16
      error = jnp.linalg.norm(actual.astype(jnp.float32) - plain) / jnp.linalg.norm(plain)
      assert error < 1e-2


# Sides, input channels and groups that are no powers of two are padded; three groups, and one.
@pytest.mark.parametrize(
  ("shape", "outputs", "group", "start"),
  [((2, 8, 8, 80), 96, 32, 0), ((3, 5, 7, 20), 48, 48, 3), ((1, 10, 4, 3), 10, 10, 0)],
)
def test_convolution_with_what_follows(shape, outputs, group, start):
  x, kernel, bias = normal(*shape), normal(3, 3, shape[-1], outputs) / shape[-1], normal(outputs)
  layer = fused_convolution.Convolution(kernel.reshape(-1, outputs), bias)
  convolve = functools.partial(fused_convolution.convolution, x, layer, group, MODE)
  with jax.default_matmul_precision("highest"):
    expected = images.conv3x3(x, kernel) + bias
    np.testing.assert_allclose(convolve(), expected, rtol=1e-4, atol=1e-5)
    other, weights = normal(*shape[:3], 12), normal(12, outputs)
    joined = expected + other @ weights + 2 * bias
  np.testing.assert_allclose(convolve(skip=Skip(other, weights, 2 * bias)), joined, rtol=1e-4, atol=1e-5)
  for rows, silu in ((shape[0], True), (1, False)):
    affine, settings = normal(rows, start + 2 * outputs + 5), GroupNormSettings(group, 1e-5, 1.0, silu, MODE, start)
    value = convolve(skip=Skip(joined), norm=settings, affine=affine)
    np.testing.assert_allclose(value, plain_group_norm(expected + joined, affine, settings), rtol=1e-3, atol=1e-4)


def test_convolution_in_bfloat16_adds_up_in_float32():
  x, kernel, bias = normal(2, 8, 8, 80, dtype=jnp.bfloat16), normal(9 * 80, 32, dtype=jnp.bfloat16) / 24, normal(32)
  value = fused_convolution.convolution(x, fused_convolution.Convolution(kernel, bias), 32, MODE)
  assert value.dtype == jnp.bfloat16
  wide_layer = fused_convolution.Convolution(kernel.astype(jnp.float32), bias)
  wide = fused_convolution.convolution(x.astype(jnp.float32), wide_layer, 32, MODE)
  np.testing.assert_allclose(value.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
  ("positions", "group", "itemsize", "expected"),
  [(64, 32, 2, (64, 4)), (16, 32, 2, (64, 4)), (256, 32, 2, (32, 3)), (64, 32, 4, (32, 4)), (512, 16, 4, (32, 2))],
)
def test_two_programs_of_a_convolution_fit_a_small_multiprocessor(positions, group, itemsize, expected):
  channels, stages = fused_convolution.rounds(positions, group, itemsize)
  assert (channels, stages) == expected
  bytes_of_a_round = channels * (positions + group) * itemsize
  assert (stages - 1) * bytes_of_a_round <= 49 * 2**10 or stages == 2  # Triton keeps one round less than stages there.


def chain_of_blocks(shape, attention, dtype=jnp.float32):
  """Random parameters of `residual_blocks` with what follows them; and what the blocks of the networks make of `x`."""
  channels, start = shape[-1], 5
  x, affine = (
    normal(*shape, dtype=dtype),
    normal(shape[0], start + 4 * channels * len(attention), seed=1, dtype=dtype) / 4,
  )
  compute = Compute(jnp.dtype(dtype), kernels="pallas", fused_convolution=True)
  plan = [chain.Block(f"block_{i}", channels, attends) for i, attends in enumerate(attention)]
  modules = [blocks.ResidualBlock(features=channels, attention=block.attention, compute=Compute()) for block in plan]
  keys = jax.random.split(jax.random.key(0), len(plan))
  condition = blocks.Condition(normal(shape[0], 3))
  params = {
    block.name: jax.tree.map(
      lambda x: x + normal(*x.shape) / 8, blocks.init_params(module, key, x.astype(jnp.float32), condition)
    )
    for block, module, key in zip(plan, modules, keys, strict=True)
  }
  joined = chain.join(blocks.prepare(params, compute), plan, compute)[chain.PARAMS]
  expected = x.astype(jnp.float32)
  for i, (block, module) in enumerate(zip(plan, modules, strict=True)):
    starts = tuple(((norm,), start + 2 * channels * (2 * i + at)) for at, norm in enumerate(("norm_1", "norm_2")))
    condition = blocks.Condition(normal(shape[0], 3), affine.astype(jnp.float32), starts)
    expected = blocks.apply(module, params[block.name], expected, condition)
  arguments = {"start": start, "heads": blocks.heads(channels), "epsilon": blocks.GROUP_NORM_EPSILON, "mode": MODE}
  return (x, joined, affine, attention), arguments, expected


# Three heads, sides and channels that are no powers of two; four heads; attention in the middle, everywhere, nowhere.
@pytest.mark.parametrize(
  ("shape", "attention"),
  [
    ((2, 5, 7, 24), (False, True, False, True)),
    ((1, 8, 8, 32), (False, True, True)),
    ((3, 6, 9, 16), (True,)),
    ((2, 4, 4, 8), (False, False)),
  ],
)
def test_residual_blocks_in_one_kernel(shape, attention):
  with jax.default_matmul_precision("highest"):
    arguments, settings, expected = chain_of_blocks(shape, attention)
  assert fused_blocks.fits(arguments[0])
  np.testing.assert_allclose(fused_blocks.residual_blocks(*arguments, **settings), expected, rtol=1e-3, atol=1e-4)


def test_residual_blocks_in_bfloat16_agree_with_those_of_float32():
  arguments, settings, expected = chain_of_blocks((2, 8, 8, 32), (False, False, True), jnp.bfloat16)
  value = fused_blocks.residual_blocks(*arguments, **settings)
  assert value.dtype == jnp.bfloat16
  assert jnp.linalg.norm(value.astype(jnp.float32) - expected) / jnp.linalg.norm(expected) < 1e-2


def test_residual_blocks_of_packed_runs_are_those_of_each():
  (x, joined, affine, attention), settings, _ = chain_of_blocks((2, 4, 4, 16), (False, True))
  runs = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), (x, joined, affine))
  together = jax.vmap(lambda *run: fused_blocks.residual_blocks(*run, attention, **settings))(*runs)
  for i in range(3):
    run = jax.tree.map(lambda x, i=i: x[i], runs)
    alone = fused_blocks.residual_blocks(*run, attention, **settings)
    np.testing.assert_allclose(together[i], alone, rtol=1e-5, atol=1e-5)


def test_residual_blocks_that_do_not_fit_together_are_refused():
  (x, joined, affine, attention), settings, _ = chain_of_blocks((2, 4, 4, 16), (False, True))
  for arguments, match in (
    ((x[..., :8], joined, affine, attention), "parameters"),
    ((x, joined, affine, (True,)), "parameters"),
    ((x, joined, affine[:1], attention), "affine"),
    ((x, joined, affine[:, 1:], attention), "affine"),
    ((x, joined, affine, (False, False)), "attention"),
    ((x, joined, affine, (True, True)), "attention"),
    ((x, joined._replace(attention=None), affine, attention), "attention"),
  ):
    with pytest.raises(ValueError, match=match):
      fused_blocks.residual_blocks(*arguments, **settings)
  with pytest.raises(ValueError, match="3 heads"):
    fused_blocks.residual_blocks(x, joined, affine, attention, **{**settings, "heads": 3})


def test_convolutions_of_packed_runs_are_those_of_each():
  x, kernel, bias = normal(3, 2, 4, 4, 20), normal(3, 180, 16), normal(3, 16)
  settings = GroupNormSettings(16, 1e-5, 1.0, True, MODE)

  def convolve(x, kernel, bias, affine):
    layer = fused_convolution.Convolution(kernel, bias)
    return fused_convolution.convolution(x, layer, 16, MODE, norm=settings, affine=affine)

  arguments = (x, kernel, bias, normal(3, 2, 32))
  together = jax.vmap(convolve)(*arguments)
  for i in range(3):
    np.testing.assert_allclose(together[i], convolve(*(value[i] for value in arguments)), rtol=1e-5, atol=1e-5)


def test_all_can_be_mapped_over_packed_runs():
  settings = GroupNormSettings(16, 1e-5, 1.0, True, MODE)
  x, affine, qkv = normal(3, 2, 4, 4, 16), normal(3, 2, 32), normal(3, 2, 16, 48)
  together = jax.vmap(lambda *args: kernels.group_norm(*args, settings))(x, affine)
  attended = jax.vmap(lambda qkv: kernels.attention(qkv, 2, MODE))(qkv)
  layers = (x, normal(3, 16, 48), normal(3, 48))
  first = jax.vmap(lambda *layer: fused_attention.attention(*layer, 2, MODE))(*layers)
  shared = jax.vmap(lambda x: kernels.group_norm(x, affine[0, :1], settings))(x)
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(kernels.group_norm(x, affine[0, :1], settings))))
  gradients = jax.vmap(gradient)(x)
  for i in range(3):
    np.testing.assert_allclose(shared[i], kernels.group_norm(x[i], affine[0, :1], settings), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradients[i], gradient(x[i]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together[i], kernels.group_norm(x[i], affine[i], settings), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(attended[i], kernels.attention(qkv[i], 2, MODE), rtol=1e-6, atol=1e-6)
    alone = fused_attention.attention(*(part[i] for part in layers), 2, MODE)
    np.testing.assert_allclose(first[i], alone, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit():
  assert kernels.fits_group_norm(jnp.zeros((1, 8, 8, 160)), 32)
  assert not kernels.fits_group_norm(jnp.zeros((1, 64, 64, 32)), 32)
  assert fused_convolution.fits_convolution(jnp.zeros((1, 16, 16, 64)), 32)
  assert not fused_convolution.fits_convolution(jnp.zeros((1, 32, 32, 64)), 32)
  assert fused_blocks.fits(jnp.zeros((1, 8, 8, 63)))
  assert not fused_blocks.fits(jnp.zeros((1, 10, 10, 32)))
  assert not fused_blocks.fits(jnp.zeros((1, 16, 16, 32)))
  assert fused_blocks.fits(jnp.zeros((1, 10, 10, 32), jnp.bfloat16))
  assert kernels.fits_attention(jnp.zeros((1, 10, 10, 8)))
  assert not kernels.fits_attention(jnp.zeros((1, 16, 16, 8)))


def test_shapes_that_do_not_fit_together_are_refused():
  settings = GroupNormSettings(32, 1e-5, 1.0, True, MODE)
  x = jnp.zeros((3, 4, 4, 64))
  for affine in (jnp.zeros((2, 128)), jnp.zeros((3, 127))):
    with pytest.raises(ValueError, match="affine"):
      kernels.group_norm(x, affine, settings)
    with pytest.raises(ValueError, match="affine"):
      jax.grad(lambda x, affine=affine: kernels.group_norm(x, affine, settings).sum())(x)
  with pytest.raises(ValueError, match="groups of 48"):
    kernels.group_norm(x, jnp.zeros((3, 128)), settings._replace(group=48))
  layer = fused_convolution.Convolution(jnp.zeros((9 * 64, 32)), jnp.zeros(32))
  weights, bias = jnp.zeros((64, 32)), jnp.zeros(32)
  skips = (Skip(x[:1, ..., :32]), Skip(x), Skip(x, weights), Skip(x, weights[:, :16], bias))
  for group, of, skip in ((24, x, None), (32, x[..., :8], None), *((32, x, skip) for skip in skips)):
    with pytest.raises(ValueError, match="fit"):
      fused_convolution.convolution(of, layer, group, MODE, skip=skip)
  for affine in (None, jnp.zeros((2, 64)), jnp.zeros((3, 63))):
    with pytest.raises(ValueError, match="affine"):
      fused_convolution.convolution(x, layer, 32, MODE, norm=settings, affine=affine)
  for kernel, heads in ((jnp.zeros((64, 192)), 5), (jnp.zeros((48, 192)), 4)):
    with pytest.raises(ValueError, match="heads do not fit"):
      fused_attention.attention(x, kernel, jnp.zeros(192), heads, MODE)
  with pytest.raises(ValueError, match="5 heads do not divide"):
    kernels.attention(jnp.zeros((2, 16, 48)), 5, MODE)


@pytest.mark.parametrize(
  ("platform", "capability", "runs"),
  [("gpu", "9.0", True), ("gpu", "8.0", True), ("gpu", "7.5", False), ("gpu", "gfx942", False), ("cpu", None, False)],
)
def test_resolve_kernels(platform, capability, runs, monkeypatch):
  device = types.SimpleNamespace(platform=platform, compute_capability=capability)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert kernels.runs_here() == runs
  assert kernels.resolve_kernels("xla") == "xla"
  assert kernels.resolve_kernels("pallas") == "pallas"
  assert kernels.resolve_kernels("auto") == ("pallas" if runs else "xla")
