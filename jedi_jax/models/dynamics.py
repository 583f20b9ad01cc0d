"""Dynamics: how the next latent follows from past latents and actions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jedi_jax.models.codecs import Codec
from jedi_jax.nn import blocks
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.ops import edm, sampler
from jedi_jax.types import Array, Losses, Params, Term


class DenoisingNoise(NamedTuple):
  """The random numbers of one denoising loss over n targets.

  Attributes:
    sigma: [B, n] noise levels.
    noise: [B, n, h, w, c] standard normal.
    offset: [B, n, 1, 1, c] standard normal, scaled by the offset noise in the loss.
    use_estimate: [] bool; whether later targets are conditioned on the estimates of earlier ones.
  """

  sigma: Array
  noise: Array
  offset: Array
  use_estimate: Array


class SampleNoise(NamedTuple):
  """The random numbers of one sampled frame.

  Attributes:
    start: [B, h, w, c] standard normal.
    churn: [B, steps, h, w, c] standard normal, or None where the sampler has no churn.
  """

  start: Array
  churn: Array | None


class Dynamics(NamedTuple):
  """Dynamics as data and pure functions.

  Attributes:
    init: key -> parameters. The key is consumed.
    training_noise: ([B] keys, key for what a batch shares, update count []) -> noise of one loss.
    losses: (parameters, inputs [B, L + n - 1, h, w, c], targets [B, n, h, w, c], actions [B, L + n - 1], mask [B, n],
      noise) -> `Losses`. Target i follows inputs i .. i + L - 1. Gradients flow into the inputs, never the targets.
    sample_noise: ([B] keys, number of frames T) -> `SampleNoise` with a leading axis T.
    sample: (parameters, past [B, L, h, w, c], actions [B, L], noise) -> next latent [B, h, w, c].
    normalise: (parameters, latents [B, h, w, c], the latents before them) -> what is learned of them, in its units.
  """

  init: Callable[[Array], Params]
  training_noise: Callable[[Array, Array, Array], Any]
  losses: Callable[[Params, Array, Array, Array, Array, Any], Losses]
  sample_noise: Callable[[Array, int], Any]
  sample: Callable[[Params, Array, Array, Any], Array]
  normalise: Callable[[Params, Array, Array], Array]


def switch(mode: str, key: Array, count: Array) -> Array:
  """Decides whether later targets of a batch are conditioned on estimates; [] bool.

  Args:
    mode: 'random' for a fair coin, 'alternate' for every other update, 'always_encoder' or 'always_denoiser'.
    key: consumed by 'random' only.
    count: [] int32, updates so far.
  """
  if mode == "random":
    return jax.random.bernoulli(key)
  if mode == "alternate":
    return count % 2 == 1
  if mode in ("always_encoder", "always_denoiser"):
    return jnp.asarray(mode == "always_denoiser")
  raise ValueError(f"unknown mode {mode!r}")


def diffusion(
  codec: Codec,
  network: InnerNetwork,
  *,
  conditioning_frames: int,
  targets: int,
  switching: str,
  target: str,
  sigma_data: float,
  follow_scale: bool,
  offset_noise: float,
  sigma_log_mean: float,
  sigma_log_std: float,
  sigma_min: float,
  sigma_max: float,
  sampler_sigmas: Sequence[float],
  sampler_gammas: Sequence[float],
  sampler_order: int,
  churn_noise: float,
) -> Dynamics:
  """An EDM denoiser of latents, trained on its own estimates or the codec's latents, sampled in a few steps.

  With D = clamp(c_skip x + c_out F) the loss of a target z' is mean ||(D - z') / c_out||^2: EDM's loss on F where
  there is no clamp, and still minimal at D = z' where there is one. The soft clamp is not the identity, so F then has
  to undo it: where c_out is small (no offset noise, low sigma) and latents are large, F leaves the unit range that the
  preconditioning is made for. With offset noise 0.3 and latents below 1 it does not.

  Args:
    codec: gives the latent's shape and what estimates go through.
    network: the inner network F.
    conditioning_frames: L.
    targets: n, successive targets of one loss.
    switching: see `switch`.
    target: 'latent' to diffuse the next latent x, 'change' to diffuse its difference from the last one, in units in
      which that has standard deviation `sigma_data`. A network that gives 0 is then as good as copying, and the least
      noise level is small against one step's change and not only against the latents. How large a change is, a
      parameter 'change_std' that the learner keeps, is measured on the way. Leave estimates unclamped then: the soft
      clamp would move what does not change.
    sigma_data: standard deviation assumed of the latents.
    follow_scale: whether all of this happens in units in which the latents' measured standard deviation, a parameter
      'latent_std' that the learner keeps, is `sigma_data`.
    offset_noise: standard deviation of the offset noise.
    sigma_log_mean: mean of ln sigma in training.
    sigma_log_std: standard deviation of ln sigma in training.
    sigma_min: least noise level in training.
    sigma_max: largest noise level in training.
    sampler_sigmas: see `sampler.sample`.
    sampler_gammas: see `sampler.sample`.
    sampler_order: see `sampler.sample`.
    churn_noise: standard deviation of churn's noise.
  """
  latent_shape = codec.latent_shape
  has_churn = any(gamma > 0 for gamma in sampler_gammas)

  def init(key: Array) -> Params:
    latent = jnp.zeros((1, *latent_shape))
    past = jnp.zeros((1, conditioning_frames, *latent_shape))
    actions = jnp.zeros((1, conditioning_frames), jnp.int32)
    params = dict(blocks.init_params(network, key, latent, jnp.zeros((1,)), past, actions))
    if follow_scale:
      params["latent_std"] = jnp.zeros(())
    if target == "change":
      params["change_std"] = jnp.zeros(())
    return params

  def frame(params: Params, last: Array) -> _Frame:
    if target == "change":
      return _Frame(jax.lax.stop_gradient(last), _unit(params, "change_std", sigma_data))
    return _Frame(jnp.zeros_like(last), _unit(params, "latent_std", sigma_data))

  def estimate(params: Params, noisy: Array, sigma: Array, past: Array, actions: Array) -> tuple[Array, Array]:
    """Returns the clamped estimate [B, h, w, c] of what is diffused and c_out [B, 1, 1, 1]; `past` are latents."""
    coefficients = edm.precondition(sigma, sigma_data=sigma_data, offset_noise=offset_noise)
    c_in, c_out, c_skip = (x[:, None, None, None] for x in coefficients[:3])
    scaled = past / (_unit(params, "latent_std", sigma_data) * sigma_data)
    output = blocks.apply(network, params, c_in * noisy, coefficients.c_noise, scaled, actions)
    return frame(params, past[:, -1]).through(codec.clamp, c_skip * noisy + c_out * output), c_out

  def training_noise(keys: Array, shared_key: Array, count: Array) -> DenoisingNoise:
    def draw(key: Array) -> tuple[Array, Array, Array]:
      sigma_key, noise_key, offset_key = jax.random.split(key, 3)
      return (
        jax.random.normal(sigma_key, (targets,)),
        jax.random.normal(noise_key, (targets, *latent_shape)),
        jax.random.normal(offset_key, (targets, 1, 1, latent_shape[2])),
      )

    normal, noise, offset = jax.vmap(draw)(keys)
    sigma = edm.training_sigma(
      normal, log_mean=sigma_log_mean, log_std=sigma_log_std, sigma_min=sigma_min, sigma_max=sigma_max
    )
    return DenoisingNoise(sigma, noise, offset, switch(switching, shared_key, count))

  def losses(params: Params, inputs: Array, clean: Array, actions: Array, mask: Array, noise: DenoisingNoise) -> Losses:
    clean = jax.lax.stop_gradient(clean)

    def error(i: int, past: Array, past_actions: Array) -> tuple[Array, Array]:
      sigma, at = noise.sigma[:, i], frame(params, past[:, -1])
      diffused = at.enter(clean[:, i])
      noisy = edm.corrupt(diffused, sigma, noise.noise[:, i], noise.offset[:, i], offset_noise=offset_noise)
      estimated, c_out = estimate(params, noisy, sigma, past, past_actions)
      return jnp.mean(jnp.square((estimated - diffused) / c_out), axis=(1, 2, 3)), at.leave(estimated)

    found = autoregressive_losses(
      error, codec.quantise, inputs, clean, actions, mask, noise.use_estimate, conditioning_frames=conditioning_frames
    )
    if target != "change":
      return found
    change = jax.lax.stop_gradient(clean[:, 0] - inputs[:, conditioning_frames - 1])
    square = Term(jnp.mean(jnp.square(change), axis=(1, 2, 3)), mask[:, 0].astype(jnp.float32))
    return found._replace(metrics={**found.metrics, "change_square": square})

  def sample_noise(keys: Array, num_frames: int) -> SampleNoise:
    def draw(key: Array) -> SampleNoise:
      start_key, churn_key = jax.random.split(key)
      start = jax.random.normal(start_key, (num_frames, *latent_shape))
      steps = len(sampler_gammas)
      churn = jax.random.normal(churn_key, (num_frames, steps, *latent_shape)) if has_churn else None
      return SampleNoise(start, churn)

    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.vmap(draw)(keys))

  def sample(params: Params, past: Array, actions: Array, noise: SampleNoise) -> Array:
    at = frame(params, past[:, -1])

    def denoise(noisy: Array, sigma: Array) -> Array:
      return at.through(codec.quantise, estimate(params, noisy, sigma, past, actions)[0])

    churn = None if noise.churn is None else churn_noise * jnp.moveaxis(noise.churn, 1, 0)
    sampled = sampler.sample(
      denoise, noise.start, sampler_sigmas, order=sampler_order, gammas=sampler_gammas, churn_noise=churn
    )
    return at.leave(sampled)

  def normalise(params: Params, latents: Array, last: Array) -> Array:
    return frame(params, last).enter(latents)

  return Dynamics(init, training_noise, losses, sample_noise, sample, normalise)


def regression(
  codec: Codec,
  network: InnerNetwork,
  *,
  conditioning_frames: int,
  targets: int,
  switching: str,
  sigma_data: float,
  follow_scale: bool,
) -> Dynamics:
  """Direct regression of the next latent, with the denoiser's network and targets but no noise.

  The network predicts the change from the last latent, in units of `sigma_data`; its place for the noisy frame holds
  the last latent and its noise level is constant. The loss is the mean squared error in those units.

  Args: as in `diffusion`.
  """
  latent_shape = codec.latent_shape

  def init(key: Array) -> Params:
    past = jnp.zeros((1, conditioning_frames, *latent_shape))
    actions = jnp.zeros((1, conditioning_frames), jnp.int32)
    params = blocks.init_params(network, key, past[:, 0], jnp.zeros((1,)), past, actions)
    return {**params, "latent_std": jnp.zeros(())} if follow_scale else params

  def unit(params: Params) -> Array:
    return _unit(params, "latent_std", sigma_data)

  def estimate(params: Params, past: Array, actions: Array) -> Array:
    scaled = past / (unit(params) * sigma_data)
    change = blocks.apply(network, params, scaled[:, -1], jnp.zeros((past.shape[0],)), scaled, actions)
    return codec.clamp(past[:, -1] + unit(params) * sigma_data * change)

  def training_noise(keys: Array, shared_key: Array, count: Array) -> Array:
    del keys
    return switch(switching, shared_key, count)

  def losses(params: Params, inputs: Array, clean: Array, actions: Array, mask: Array, use_estimate: Array) -> Losses:
    clean = jax.lax.stop_gradient(clean)

    def error(i: int, past: Array, past_actions: Array) -> tuple[Array, Array]:
      estimated = estimate(params, past, past_actions)
      scale = unit(params) * sigma_data
      return jnp.mean(jnp.square((estimated - clean[:, i]) / scale), axis=(1, 2, 3)), estimated

    return autoregressive_losses(
      error, codec.quantise, inputs, clean, actions, mask, use_estimate, conditioning_frames=conditioning_frames
    )

  def sample_noise(keys: Array, num_frames: int) -> Array:
    return jnp.zeros((num_frames, keys.shape[0]))  # Nothing is drawn; the shape tells a scan how long it is.

  def sample(params: Params, past: Array, actions: Array, noise: Array) -> Array:
    del noise
    return codec.quantise(estimate(params, past, actions))

  def normalise(params: Params, latents: Array, last: Array) -> Array:
    return (latents - last) / unit(params)

  return Dynamics(init, training_noise, losses, sample_noise, sample, normalise)


class _Frame(NamedTuple):
  """Where and in which units diffusion takes place: x = (latent - origin) / unit.

  Attributes:
    origin: [B, h, w, c].
    unit: [].
  """

  origin: Array
  unit: Array

  def enter(self, latents: Array) -> Array:
    return (latents - self.origin) / self.unit

  def leave(self, x: Array) -> Array:
    return self.origin + self.unit * x

  def through(self, function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function of latents."""
    return self.enter(function(self.leave(x)))


def _unit(params: Params, name: str, sigma_data: float) -> Array:
  """What brings a measured standard deviation to `sigma_data`; 1 where it is not measured, or not yet (0)."""
  if name not in params:
    return jnp.ones(())
  measured = jax.lax.stop_gradient(params[name])
  return jnp.where(measured > 0, measured / sigma_data, 1.0)


def autoregressive_losses(
  error: Callable[[int, Array, Array], tuple[Array, Array]],
  quantise: Callable[[Array], Array],
  inputs: Array,
  clean: Array,
  actions: Array,
  mask: Array,
  use_estimate: Array,
  *,
  conditioning_frames: int,
) -> Losses:
  """Trains n successive targets, each conditioned on the L frames before it.

  Args:
    error: (target i, past [B, L, h, w, c], actions [B, L]) -> (error [B], clamped estimate [B, h, w, c]).
    quantise: makes a latent of an estimate.
    inputs: [B, L + n - 1, h, w, c].
    clean: [B, n, h, w, c] targets; only their shape is looked at here.
    actions: [B, L + n - 1].
    mask: [B, n] bool; false where a target is padding.
    use_estimate: [] bool; whether the estimates of earlier targets stand in for their latents, without gradient.
    conditioning_frames: L.
  """
  batch, targets, *latent_shape = clean.shape
  chex.assert_shape(inputs, (batch, conditioning_frames + targets - 1, *latent_shape))
  chex.assert_shape(actions, (batch, conditioning_frames + targets - 1))
  chex.assert_shape(mask, (batch, targets))
  frames = [inputs[:, t] for t in range(inputs.shape[1])]
  terms = {}
  for i in range(targets):
    stop = i + conditioning_frames
    value, estimated = error(i, jnp.stack(frames[i:stop], axis=1), actions[:, i:stop])
    terms[f"denoising_{i}"] = Term(value / targets, mask[:, i].astype(jnp.float32))
    if i + 1 < targets:
      feedback = jax.lax.stop_gradient(quantise(estimated))
      frames[stop] = jnp.where(use_estimate, feedback, frames[stop])
  return Losses(terms, {"used_estimates": use_estimate.astype(jnp.float32)})
