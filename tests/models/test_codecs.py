import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jedi_jax.models import codecs


@pytest.fixture(scope="module")
def encode_frames(world, jit):
  return jit(functools.partial(codecs.encode_frames, world.codec))


def small(*, clamp=3.0, clamp_estimate=True, chunk=0, norm="none"):
  return codecs.learned(
    (8, 8, 3),
    channels=(4,),
    downsample=(True,),
    patch=1,
    clamp=clamp,
    clamp_estimate=clamp_estimate,
    chunk=chunk,
    norm=norm,
  )


def test_pixels_are_scaled_to_plus_minus_one():
  scaled = codecs.scale_pixels(jnp.asarray([0, 51, 255], jnp.uint8))
  assert scaled.dtype == jnp.float32
  np.testing.assert_allclose(scaled, [-1, -0.6, 1], atol=1e-6)


def test_padding_becomes_the_zero_latent_and_frames_are_encoded_one_by_one(world, make_segment, encode_frames, jit):
  segment = make_segment(2, 3, mask=[[False, True, True], [True, True, False]])
  params = world.params["encoder"]
  latents = encode_frames(params, segment.observations, segment.mask)
  assert latents.shape == (2, 3, *world.codec.latent_shape)
  assert latents.dtype == jnp.float32
  np.testing.assert_array_equal(latents[0, 0], 0)
  np.testing.assert_array_equal(latents[1, 2], 0)
  images = segment.observations[1].astype(jnp.float32) / 255 * 2 - 1
  np.testing.assert_allclose(latents[1, :2], jit(world.codec.encode)(params, images)[:2], rtol=1e-4, atol=1e-5)


def test_latents_stay_within_the_clamp(world, make_segment, encode_frames):
  segment = make_segment(2, 2)
  params = {**world.params["encoder"]}
  params["stage_1"] = {**params["stage_1"], "conv": {**params["stage_1"]["conv"], "bias": jnp.full((4,), 50.0)}}
  latents = encode_frames(params, segment.observations, segment.mask)
  assert world.codec.limit == 3.0
  np.testing.assert_allclose(latents, 3.0, atol=1e-3)
  assert np.max(latents) <= 3.0


@pytest.mark.parametrize(
  ("clamp", "clamp_estimate", "estimate"), [(3.0, True, 3 * np.tanh(2)), (3.0, False, 6.0), (0.0, True, 6.0)]
)
def test_estimates_are_clamped_if_wanted(clamp, clamp_estimate, estimate):
  codec = small(clamp=clamp, clamp_estimate=clamp_estimate)
  assert codec.latent_shape == (4, 4, 4)
  assert codec.limit == (clamp or None)
  np.testing.assert_allclose(codec.clamp(jnp.asarray(6.0)), estimate, rtol=1e-6)
  np.testing.assert_allclose(codec.quantise(jnp.asarray(6.0)), 6.0)


def test_frames_of_a_wrong_type_or_shape_are_refused(world, make_segment):
  segment, params = make_segment(2, 3), world.params["encoder"]
  for observations, mask in (
    (segment.observations.astype(jnp.float32), segment.mask),
    (segment.observations[:, 0], segment.mask),
    (segment.observations, segment.mask[:, 1:]),
  ):
    with pytest.raises(AssertionError):
      codecs.encode_frames(world.codec, params, observations, mask)


@pytest.mark.parametrize(("frames", "chunk"), [(12, 4), (13, 4), (4, 4), (3, 4), (5, 4), (3, 1)])
def test_chunks_change_neither_latents_nor_gradients(frames, chunk):
  generator = np.random.default_rng(0)
  images = jnp.asarray(generator.uniform(-1, 1, (frames, 8, 8, 3)), jnp.float32)
  weights = jnp.asarray(generator.normal(size=(frames, 4, 4, 4)), jnp.float32)
  params = small().init(jax.random.key(0))

  def loss(params, images, *, codec):
    latents = codec.encode(params, images)
    return jnp.sum(weights * latents), latents

  ours, whole = (
    jax.jit(jax.grad(functools.partial(loss, codec=small(chunk=size)), argnums=(0, 1), has_aux=True))(params, images)
    for size in (chunk, 0)
  )
  assert np.any(whole[0][1] != 0)
  chex.assert_trees_all_close(ours, whole, rtol=1e-4, atol=1e-5)


def test_chunks_need_less_memory():
  images = jax.ShapeDtypeStruct((64, 8, 8, 3), jnp.float32)
  params = jax.eval_shape(small().init, jax.random.key(0))

  def temporary(chunk):
    gradient = jax.grad(lambda params, images: jnp.sum(small(chunk=chunk).encode(params, images) ** 2))
    return jax.jit(gradient).lower(params, images).compile().memory_analysis().temp_size_in_bytes

  assert temporary(8) < temporary(0) / 3


def images(count, seed=0):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (count, 8, 8, 3)), jnp.float32)


def converged(codec, frames):
  """Parameters whose running statistics, if there are any, are those of the frames."""
  params = codec.init(jax.random.key(0))

  @jax.jit
  def track(params):
    return codec.track(params, codec.moments(codec.encode(params, frames)[None], jnp.ones((1, len(frames)), bool)))

  for _ in range(1_500 if codec.track is not None else 0):
    params = track(params)
  return params


@pytest.mark.parametrize("norm", ["none", "frame", "running"])
def test_no_gradient_scales_normalised_latents(norm):
  codec = small(norm=norm, clamp=0.0)
  params = converged(codec, images(6))
  goal = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4, 4, 4)), jnp.float32)

  @jax.jit
  def gradient(params, frames):
    return jax.grad(lambda params: jnp.sum(goal * codec.encode(params, frames)))(params)

  # Frames whose statistics are not the running ones.
  got = gradient(params, images(6, seed=3))
  # These two scale the features in common: the group norm between them is blind to scale.
  parts = [(params["conv_in"], got["conv_in"]), (params["stage_0"]["conv"], got["stage_0"]["conv"])]
  products = [np.sum(p * g) for tree in parts for p, g in zip(*map(jax.tree.leaves, tree), strict=True)]
  along_scale, size = abs(sum(products)), sum(map(abs, products))
  assert size > 0.1
  assert (along_scale < 2e-3 * size) == (norm != "none")
  assert not any(np.any(x) for x in jax.tree.leaves(got.get("running", {})))


def test_padding_is_no_part_of_the_statistics():
  codec = small(norm="running")
  params, frames = codec.init(jax.random.key(0)), images(6)
  mask = jnp.asarray([True, True, False, True, False, True])
  real = frames[mask]
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 4, 4)), jnp.float32)
  masked = jax.jit(jax.grad(lambda p: jnp.sum(weights * codec.encode(p, frames, mask)[np.asarray(mask)])))(params)
  alone = jax.jit(jax.grad(lambda p: jnp.sum(weights * codec.encode(p, real))))(params)
  chex.assert_trees_all_close(masked, alone, rtol=1e-3, atol=1e-4)
  latents = codec.encode(params, frames)[None]
  chex.assert_trees_all_close(
    codec.moments(latents, mask[None]), codec.moments(latents[:, mask], jnp.ones((1, 4), bool)), rtol=1e-5
  )


def test_a_frame_is_normalised_over_its_positions_and_channels():
  codec = small(norm="frame", clamp=0.0)
  latents = np.asarray(codec.encode(codec.init(jax.random.key(0)), images(3)))
  np.testing.assert_allclose(latents.mean((1, 2, 3)), 0, atol=1e-5)
  np.testing.assert_allclose(latents.std((1, 2, 3)), 1, atol=1e-3)
  clamped = small(norm="frame")
  assert clamped.track is None
  np.testing.assert_allclose(
    clamped.encode(clamped.init(jax.random.key(0)), images(3)), 3 * np.tanh(latents / 3), rtol=1e-4, atol=1e-5
  )


def test_running_statistics_follow_the_latents_to_mean_0_and_mean_variance_1():
  codec, frames = small(norm="running", clamp=0.0), images(64)
  params, encode = converged(codec, frames), jax.jit(codec.encode)
  start = np.asarray(encode(codec.init(jax.random.key(0)), frames))
  latents = np.asarray(encode(params, frames))
  assert abs(start.var(0).mean() - 1) > 0.3
  np.testing.assert_allclose(latents.mean(0), 0, atol=0.02)
  np.testing.assert_allclose(latents.var(0).mean(), 1, atol=0.02)
  # A frame's latent depends on no other frame.
  np.testing.assert_allclose(encode(params, frames)[:1], codec.encode(params, frames[:1]), rtol=1e-4, atol=1e-5)
