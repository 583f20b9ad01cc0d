"""Dynamics: predict the next latent from past latents and actions."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jedi_jax.models.codecs import Codec
from jedi_jax.nn import blocks
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.ops import edm, sampler
from jedi_jax.types import Array, Losses, Params, Term


class Scaling(NamedTuple):
  """What the preconditioning of `ops.edm.precondition` assumes.

  Attributes:
    sigma_data: standard deviation of the clean data.
    offset_noise: standard deviation of the noise that all positions of a channel share.
  """

  sigma_data: float = 0.5
  offset_noise: float = 0.3


class NoiseLevels(NamedTuple):
  """Distribution of the training noise levels: log-normal, clipped.

  Attributes:
    log_mean: mean of ln sigma.
    log_std: standard deviation of ln sigma.
    sigma_min: smallest level.
    sigma_max: largest level.
  """

  log_mean: float = -0.4
  log_std: float = 1.2
  sigma_min: float = 2e-3
  sigma_max: float = 20.0


class Schedule(NamedTuple):
  """How `ops.sampler.sample` integrates the reverse process.

  Attributes:
    sigmas: decreasing levels with a final 0.
    order: 1 for Euler's method, 2 for Heun's.
    gammas: relative increase of each positive level by churn; None for no churn.
    churn_noise: standard deviation of the noise that churn adds.
    start: 'unit' to start from noise of unit variance as DIAMOND does, 'sigma_max' from noise of the first level.
  """

  sigmas: tuple[float, ...] = sampler.karras_sigmas(3, sigma_min=2e-3, sigma_max=5.0, rho=7.0)
  order: int = 1
  gammas: tuple[float, ...] | None = None
  churn_noise: float = 1.0
  start: str = "unit"


class DenoisingNoise(NamedTuple):
  """The random numbers of one denoising loss over n targets.

  Attributes:
    sigma: [B, n] noise levels.
    noise: [B, n, h, w, c] standard normal.
    offset: [B, n, 1, 1, c] standard normal; the loss multiplies it by the offset noise.
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
    churn: [B, steps, h, w, c] standard normal; None if the sampler has no churn.
  """

  start: Array
  churn: Array | None


class Dynamics(NamedTuple):
  """Dynamics as data and pure functions.

  Attributes:
    init: key -> parameters. The key is consumed.
    training_noise: (keys [B], key that the batch shares, update count []) -> noise of one loss.
    losses: (parameters, inputs [B, L + n - 1, h, w, c], targets [B, n, h, w, c], actions [B, L + n - 1], mask [B, n],
      noise) -> `Losses`. Target i follows inputs i .. i + L - 1. Gradients flow into the inputs, never the targets.
    sample_noise: (keys [B], number of frames T) -> noise of T samples, with a leading axis T.
    sample: (parameters, past [B, L, h, w, c], actions [B, L], noise) -> next latent [B, h, w, c].
    normalise: (parameters, latents [B, h, w, c], last latents [B, h, w, c]) -> what the network learns to predict.
    denormalise: the inverse of `normalise`.
    denoise: D(x, sigma) as samplers use it: (parameters, x [B, h, w, c], sigma [B], past [B, L, h, w, c], actions
      [B, L]) -> estimate [B, h, w, c] of the clean x, clamped and quantised by the codec; x and the estimate are as
      `normalise` returns them. None without diffusion.
    prepare: parameters -> those that a loop of `sample` takes; see `blocks.prepare`.
  """

  init: Callable[[Array], Params]
  training_noise: Callable[[Array, Array, Array], Any]
  losses: Callable[[Params, Array, Array, Array, Array, Any], Losses]
  sample_noise: Callable[[Array, int], Any]
  sample: Callable[[Params, Array, Array, Any], Array]
  normalise: Callable[[Params, Array, Array], Array]
  denormalise: Callable[[Params, Array, Array], Array]
  denoise: Callable[[Params, Array, Array, Array, Array], Array] | None = None
  prepare: Callable[[Params], Params] = lambda params: params


def switch(mode: str, key: Array, count: Array) -> Array:
  """Decides whether later targets of a batch are conditioned on estimates.

  Args:
    mode: 'random' for a fair coin, 'alternate' for every other update, 'always_encoder' or 'always_denoiser'.
    key: consumed by 'random' only.
    count: [] int32, updates so far.

  Returns:
    [] bool.
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
  conditioning_frames: int = 4,
  targets: int = 2,
  switching: str = "random",
  target: str = "latent",
  scaling: Scaling = Scaling(),
  levels: NoiseLevels = NoiseLevels(),
  schedule: Schedule = Schedule(),
) -> Dynamics:
  """Builds an EDM denoiser of latents (Karras et al. 2022, arXiv:2206.00364).

  The estimate is D = clamp(c_skip x + c_out F). The loss of a target z' is mean ||(D - z') / c_out||^2. Without a clamp
  this is EDM's loss on F. With a clamp it is still minimal at D = z'. The soft clamp is not the identity, so F has to
  undo it: for large latents and a small c_out (no offset noise, low sigma) F leaves the unit range that the
  preconditioning assumes.

  Args:
    codec: gives the shape of a latent and the maps that estimates go through.
    network: the inner network F.
    conditioning_frames: L.
    targets: n, successive targets of one loss.
    switching: see `switch`.
    target: 'latent' diffuses the next latent. 'change' diffuses its difference from the last latent, scaled to standard
      deviation `sigma_data` by the parameter 'change_std', a running measurement. A network that returns 0 then copies
      the last latent, and the smallest noise level is small compared with the change of one step. Use it without a
      clamp on estimates: the soft clamp would move what does not change.
    scaling: assumptions of the preconditioning.
    levels: noise levels in training.
    schedule: of the sampler.
  """
  parts = _Diffusion(codec, network, conditioning_frames, targets, switching, target, scaling, levels, schedule)
  return Dynamics(
    init=parts.init,
    training_noise=parts.training_noise,
    losses=parts.losses,
    sample_noise=parts.sample_noise,
    sample=parts.sample,
    normalise=lambda params, latents, last: parts.coordinates(params, last).normalise(latents),
    denormalise=lambda params, x, last: parts.coordinates(params, last).denormalise(x),
    denoise=parts.denoise,
    prepare=lambda params: blocks.prepare(params, network.compute),
  )


@dataclasses.dataclass(frozen=True)
class _Diffusion:
  """The functions of `diffusion`; its arguments are the attributes."""

  codec: Codec
  network: InnerNetwork
  conditioning_frames: int
  targets: int
  switching: str
  target: str
  scaling: Scaling
  levels: NoiseLevels
  schedule: Schedule

  def init(self, key: Array) -> Params:
    params = dict(_init_network(self.network, key, self.codec.latent_shape, self.conditioning_frames))
    if self.target == "change":
      params["change_std"] = jnp.zeros(())
    return params

  def coordinates(self, params: Params, last: Array) -> "_Coordinates":
    """Coordinates of what is diffused, given the last latents [B, h, w, c]."""
    if self.target != "change":
      return _Coordinates(jnp.zeros_like(last), jnp.ones(()))
    measured = jax.lax.stop_gradient(params["change_std"])
    # 0 before the first measurement.
    unit = jnp.where(measured > 0, measured / self.scaling.sigma_data, 1.0)
    return _Coordinates(jax.lax.stop_gradient(last), unit)

  def estimate(self, params: Params, noisy: Array, sigma: Array, past: Array, actions: Array) -> tuple[Array, Array]:
    """Returns the clamped estimate [B, h, w, c] of what is diffused and c_out [B, 1, 1, 1]; `past` are latents."""
    sigma_data, offset_noise = self.scaling
    coefficients = edm.precondition(sigma, sigma_data=sigma_data, offset_noise=offset_noise)
    c_in, c_out, c_skip = (x[:, None, None, None] for x in coefficients[:3])
    output = blocks.apply(self.network, params, c_in * noisy, coefficients.c_noise, past / sigma_data, actions)
    at = self.coordinates(params, past[:, -1])
    return at.map_latents(self.codec.clamp, c_skip * noisy + c_out * output), c_out

  def denoise(self, params: Params, noisy: Array, sigma: Array, past: Array, actions: Array) -> Array:
    estimate, _ = self.estimate(params, noisy, sigma, past, actions)
    return self.coordinates(params, past[:, -1]).map_latents(self.codec.quantise, estimate)

  def training_noise(self, keys: Array, shared_key: Array, count: Array) -> DenoisingNoise:
    latent_shape, targets = self.codec.latent_shape, self.targets

    def draw(key: Array) -> tuple[Array, Array, Array]:
      sigma_key, noise_key, offset_key = jax.random.split(key, 3)
      return (
        jax.random.normal(sigma_key, (targets,)),
        jax.random.normal(noise_key, (targets, *latent_shape)),
        jax.random.normal(offset_key, (targets, 1, 1, latent_shape[2])),
      )

    normal, noise, offset = jax.vmap(draw)(keys)
    sigma = edm.training_sigma(normal, **self.levels._asdict())
    return DenoisingNoise(sigma, noise, offset, switch(self.switching, shared_key, count))

  def losses(
    self, params: Params, inputs: Array, clean: Array, actions: Array, mask: Array, noise: DenoisingNoise
  ) -> Losses:
    clean = jax.lax.stop_gradient(clean)

    def error(i: int, past: Array, past_actions: Array) -> tuple[Array, Array]:
      sigma, at = noise.sigma[:, i], self.coordinates(params, past[:, -1])
      diffused = at.normalise(clean[:, i])
      offset_noise = self.scaling.offset_noise
      noisy = edm.corrupt(diffused, sigma, noise.noise[:, i], noise.offset[:, i], offset_noise=offset_noise)
      estimated, c_out = self.estimate(params, noisy, sigma, past, past_actions)
      return jnp.mean(jnp.square((estimated - diffused) / c_out), axis=(1, 2, 3)), at.denormalise(estimated)

    length = self.conditioning_frames
    losses = autoregressive_losses(
      error, self.codec.quantise, inputs, clean, actions, mask, noise.use_estimate, conditioning_frames=length
    )
    if self.target != "change":
      return losses
    change = jax.lax.stop_gradient(clean[:, 0] - inputs[:, length - 1])
    real = mask[:, 0] & jnp.any(inputs[:, length - 1] != 0, axis=(1, 2, 3))  # A zero latent is padding.
    square = Term(jnp.mean(jnp.square(change), axis=(1, 2, 3)), real.astype(jnp.float32))
    return losses._replace(metrics={**losses.metrics, "change_square": square})

  def sample_noise(self, keys: Array, num_frames: int) -> SampleNoise:
    shape = self.codec.latent_shape
    steps = len(self.schedule.sigmas) - 1
    has_churn = any(gamma > 0 for gamma in self.schedule.gammas or ())

    def draw(key: Array) -> SampleNoise:
      start_key, churn_key = jax.random.split(key)
      start = jax.random.normal(start_key, (num_frames, *shape))
      churn = jax.random.normal(churn_key, (num_frames, steps, *shape)) if has_churn else None
      return SampleNoise(start, churn)

    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.vmap(draw)(keys))

  def sample(self, params: Params, past: Array, actions: Array, noise: SampleNoise) -> Array:
    sigmas, order, gammas, churn_noise, start = self.schedule
    churn = None if noise.churn is None else churn_noise * jnp.moveaxis(noise.churn, 1, 0)
    sampled = sampler.sample(
      lambda noisy, sigma: self.denoise(params, noisy, sigma, past, actions),
      noise.start * sigmas[0] if start == "sigma_max" else noise.start,
      sigmas,
      order=order,
      gammas=gammas,
      churn_noise=churn,
    )
    return self.coordinates(params, past[:, -1]).denormalise(sampled)


class _Coordinates(NamedTuple):
  """Origin and unit of what is diffused: x = (latent - origin) / unit.

  Attributes:
    origin: [B, h, w, c].
    unit: [].
  """

  origin: Array
  unit: Array

  def normalise(self, latents: Array) -> Array:
    return (latents - self.origin) / self.unit

  def denormalise(self, x: Array) -> Array:
    return self.origin + self.unit * x

  def map_latents(self, function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function of latents to x."""
    return self.normalise(function(self.denormalise(x)))


def regression(
  codec: Codec,
  network: InnerNetwork,
  *,
  conditioning_frames: int = 4,
  targets: int = 2,
  switching: str = "random",
  sigma_data: float = 0.5,
) -> Dynamics:
  """Builds direct regression of the next latent, with the denoiser's network and targets but no noise.

  The network predicts the change from the last latent, in units of `sigma_data`. The last latent takes the place of
  the noisy frame, and the noise level is constant. The loss is the mean squared error in those units.

  Args: as in `diffusion`.
  """

  def estimate(params: Params, past: Array, actions: Array) -> Array:
    scaled = past / sigma_data
    change = blocks.apply(network, params, scaled[:, -1], jnp.zeros((past.shape[0],)), scaled, actions)
    return codec.clamp(past[:, -1] + sigma_data * change)

  def losses(params: Params, inputs: Array, clean: Array, actions: Array, mask: Array, use_estimate: Array) -> Losses:
    clean = jax.lax.stop_gradient(clean)

    def error(i: int, past: Array, past_actions: Array) -> tuple[Array, Array]:
      estimated = estimate(params, past, past_actions)
      return jnp.mean(jnp.square((estimated - clean[:, i]) / sigma_data), axis=(1, 2, 3)), estimated

    return autoregressive_losses(
      error, codec.quantise, inputs, clean, actions, mask, use_estimate, conditioning_frames=conditioning_frames
    )

  return Dynamics(
    init=lambda key: _init_network(network, key, codec.latent_shape, conditioning_frames),
    training_noise=lambda keys, shared_key, count: switch(switching, shared_key, count),
    losses=losses,
    # Nothing is drawn. The leading axis gives a scan its length.
    sample_noise=lambda keys, num_frames: jnp.zeros((num_frames, keys.shape[0])),
    sample=lambda params, past, actions, noise: codec.quantise(estimate(params, past, actions)),
    normalise=lambda params, latents, last: latents - last,
    denormalise=lambda params, x, last: last + x,
    prepare=lambda params: blocks.prepare(params, network.compute),
  )


def _init_network(
  network: InnerNetwork, key: Array, latent_shape: tuple[int, int, int], conditioning_frames: int
) -> Params:
  past = jnp.zeros((1, conditioning_frames, *latent_shape))
  actions = jnp.zeros((1, conditioning_frames), jnp.int32)
  return blocks.init_params(network, key, past[:, 0], jnp.zeros((1,)), past, actions)


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
  """Computes the losses of n successive targets, each conditioned on the L frames before it.

  Args:
    error: (target i, past [B, L, h, w, c], actions [B, L]) -> (error [B], clamped estimate [B, h, w, c]).
    quantise: maps an estimate to a latent.
    inputs: [B, L + n - 1, h, w, c].
    clean: [B, n, h, w, c] targets; only their shape is used here.
    actions: [B, L + n - 1].
    mask: [B, n] bool; false where a target is padding.
    use_estimate: [] bool; whether the estimates of earlier targets replace their latents, without gradient.
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
