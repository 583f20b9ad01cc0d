"""The losses of a model, a function a phase.

Each takes the parts of the model and what a phase passes to its losses: all parameters, a `Segment`, keys [B], a key
that the batch shares, and the number of updates so far.
"""

import jax
import jax.numpy as jnp
import optax

from jedi_jax.models import codecs, imagination
from jedi_jax.models.base import Parts
from jedi_jax.ops.statistics import latent_statistics
from jedi_jax.types import Array, Losses, Metrics, Params, Segment, Term, Trajectory

_STD_RATE = 0.01
"""Rate an update at which the measured standard deviation of the latents' change follows."""
_LEAST_STD = 1e-3
"""Lower bound of that standard deviation, so that latents that do not change are not scaled up without bound."""


def encode(parts: Parts, params: dict[str, Params], observations: Array, mask: Array) -> Array:
  """Encodes frames [B, T, H, W, C] uint8 with mask [B, T] bool; returns latents [B, T, h, w, c]."""
  return codecs.encode_frames(parts.codec, params["encoder"], observations, mask)


def denoiser_losses(
  parts: Parts, params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
) -> Losses:
  """Prediction of the next latents and, with a decoder, reconstruction of the conditioning frames."""
  length = parts.conditioning_frames
  inputs = encode(parts, params, segment.observations[:, :-1], segment.mask[:, :-1])
  if parts.target_decay:
    target_params = {"encoder": params["target_encoder"]}
    clean = encode(parts, target_params, segment.observations[:, length:], segment.mask[:, length:])
  else:
    # The last frame is a target only. Encoding it separately keeps no activations for a gradient that stops.
    last = encode(parts, jax.lax.stop_gradient(params), segment.observations[:, -1:], segment.mask[:, -1:])
    clean = jnp.concatenate([inputs[:, length:], last], axis=1)
  losses = parts.dynamics.losses(
    params["denoiser"],
    inputs if "prediction" in parts.learns_from else jax.lax.stop_gradient(inputs),
    jax.lax.stop_gradient(clean),
    segment.actions[:, :-1],
    segment.mask[:, length:],
    parts.dynamics.training_noise(keys, shared_key, count),
  )
  terms = dict(losses.terms)
  if parts.decoder is not None:
    terms["reconstruction"] = reconstruction(parts.decoder, params["decoder"], inputs, segment)
  statistics = latent_statistics(inputs, segment.mask[:, :-1], parts.codec.limit)
  statistics |= _feature_moments(parts, inputs, segment.mask[:, :-1])
  return Losses(terms, {**losses.metrics, **statistics})


def reward_end_losses(
  parts: Parts, params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
) -> Losses:
  """Classification of rewards and ends."""
  del shared_key, count
  latents = encode(parts, params, segment.observations, segment.mask)
  moments = _feature_moments(parts, latents, segment.mask)  # Of the encoder's latents, so without noise.
  if parts.reward_end_noise:
    noise = jax.vmap(_noise_or_zeros, in_axes=(0, None))(keys, latents.shape[1:])
    latents += parts.reward_end_noise * noise * segment.mask[:, :, None, None, None]
  real = segment.mask[:, :-1] & segment.mask[:, 1:]
  rewards, ends = segment.rewards[:, :-1], segment.ends[:, :-1]
  losses = parts.reward_end.losses(
    params["reward_end"], latents[:, :-1], segment.actions[:, :-1], latents[:, 1:], rewards, ends, real
  )
  # The return of the policy in replay over H steps, to compare with the imagined return.
  start = parts.conditioning_frames - 1
  replay_return = jnp.sum((jnp.sign(rewards) * real)[:, start:], axis=1)
  metrics = {
    "replay_return": Term(replay_return, real[:, start].astype(jnp.float32)),
    "replay_end_rate": Term(ends.astype(jnp.float32), real.astype(jnp.float32)),
  }
  return losses._replace(metrics={**losses.metrics, **metrics, **moments})


def _feature_moments(parts: Parts, latents: Array, mask: Array) -> dict[str, Array]:
  """Returns what `track_latents` needs; empty without running statistics."""
  return {} if parts.codec.moments is None else {"feature_moments": parts.codec.moments(latents, mask)}


def _noise_or_zeros(key: Array, shape: tuple[int, ...]) -> Array:
  """Draws standard normal numbers or, by a fair coin, returns zeros."""
  coin_key, noise_key = jax.random.split(key)
  return jnp.where(jax.random.bernoulli(coin_key), jax.random.normal(noise_key, shape), 0.0)


def actor_critic_losses(
  parts: Parts, params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
) -> Losses:
  """REINFORCE on imagined trajectories."""
  del shared_key, count
  trajectory = imagine(parts, params, segment, keys, parts.horizon)
  return parts.actor_critic.losses(params["actor_critic"], trajectory)


def probe_losses(
  parts: Parts, params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
) -> Losses:
  """Reconstruction from detached latents."""
  del keys, shared_key, count
  assert parts.probe is not None
  latents = jax.lax.stop_gradient(encode(parts, params, segment.observations, segment.mask))
  return Losses({"reconstruction": reconstruction(parts.probe, params["probe"], latents, segment)}, {})


def imagine(
  parts: Parts, params: dict[str, Params], segment: Segment, keys: Array, steps: int, actions: Array | None = None
) -> Trajectory:
  """Imagines `steps` steps from the last of the L frames of a segment; see `Model.imagine`."""
  noise = imagination.draw_noise(parts.dynamics, keys, horizon=steps, num_actions=parts.spec.num_actions)
  latents = encode(parts, jax.lax.stop_gradient(params), segment.observations, segment.mask)
  return imagination.imagine(
    parts.dynamics,
    parts.reward_end,
    parts.actor_critic,
    imagining(params),
    latents,
    segment.actions[:, :-1],
    segment.mask,
    noise,
    actions=actions,
    forget_padding=parts.forget_padding,
    unroll=parts.unroll,
  )


def follow_encoder(parts: Parts, params: dict[str, Params], metrics: Metrics) -> dict[str, Params]:
  """Updates the encoder's running statistics and then the averaged encoder 'target_encoder', if they exist."""
  if parts.codec.track is not None:
    params = {**params, "encoder": parts.codec.track(params["encoder"], metrics["feature_moments"])}
  if not parts.target_decay:
    return params
  target = optax.incremental_update(params["encoder"], params["target_encoder"], 1.0 - parts.target_decay)
  return {**params, "target_encoder": target}


def follow_denoiser(parts: Parts, params: dict[str, Params], metrics: Metrics) -> dict[str, Params]:
  """Follows the encoder, and updates the denoiser's 'change_std' and then 'average_denoiser', if they exist."""
  params = follow_encoder(parts, params, metrics)
  denoiser = params["denoiser"]
  measured = {}
  if "change_std" in denoiser:
    std = jnp.maximum(jnp.sqrt(metrics["change_square"]), _LEAST_STD)
    # The first measurement replaces the initial 0.
    old = denoiser["change_std"]
    measured["change_std"] = jnp.where(old > 0, optax.incremental_update(std, old, _STD_RATE), std)
    params = {**params, "denoiser": {**denoiser, **measured}}
  if not parts.average_decay:
    return params
  average = optax.incremental_update(denoiser, params["average_denoiser"], 1.0 - parts.average_decay)
  return {**params, "average_denoiser": {**average, **measured}}


def imagining(params: dict[str, Params]) -> dict[str, Params]:
  """Returns the parameters with which a model imagines: 'denoiser' is the average denoiser, if there is one."""
  others = {name: value for name, value in params.items() if name != "average_denoiser"}
  return {**others, "denoiser": params.get("average_denoiser", params["denoiser"])}


def prepared(parts: Parts, params: dict[str, Params]) -> dict[str, Params]:
  """Returns the parameters with which a model imagines, prepared once for a loop of `imagination.step_world`."""
  return imagination.prepare(parts.dynamics, parts.reward_end, parts.actor_critic, imagining(params))


def reconstruction(decoder: codecs.Decoder, params: Params, latents: Array, segment: Segment) -> Term:
  """Squared error of the decoded latents [B, T, h, w, c] against the first T frames of the segment, one per frame."""
  batch, time = latents.shape[:2]
  images = codecs.scale_pixels(segment.observations[:, :time])
  decoded = decoder.decode(params, latents.reshape(batch * time, *latents.shape[2:])).reshape(images.shape)
  error = jnp.mean(jnp.square(decoded - images), axis=(2, 3, 4))
  return Term(error, segment.mask[:, :time].astype(jnp.float32))
