"""Variants: which codec and dynamics make a world model, and what each loss trains. The only reader of `variant`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jedi_jax import types
from jedi_jax.config import Config, make_config
from jedi_jax.errors import UserError
from jedi_jax.models import actor_critic as actor_critic_lib
from jedi_jax.models import codecs, imagination
from jedi_jax.models import dynamics as dynamics_lib
from jedi_jax.models import reward_end as reward_end_lib
from jedi_jax.nn.blocks import resolve_convolution
from jedi_jax.nn.denoiser import InnerNetwork
from jedi_jax.ops import sampler
from jedi_jax.types import Array, EnvSpec, Losses, LstmState, Metrics, Params, Segment, Trajectory


class Phase(NamedTuple):
  """One kind of update: what it draws from replay, its loss, and which parameters the loss trains.

  Attributes:
    name: also the name of its optimiser and of its counter.
    components: names of the parameters that receive gradients.
    length: frames of a segment.
    beyond_end: whether segments may run past the end of their episode.
    final_frames: whether the true final frame of an episode may be drawn as a segment's last.
    segments: segments drawn for each element of the batch; the first of all elements come first.
    losses: (all parameters, `Segment`, keys [B], key that the batch shares, update count []) -> `Losses`. Losses are
      differentiated with respect to `components` alone.
    after: (all parameters, metrics of the whole batch) -> what becomes of all parameters after each update.
    clipped_apart: components whose gradients are clipped by a norm of their own.
  """

  name: str
  components: tuple[str, ...]
  length: int
  beyond_end: bool
  final_frames: bool
  losses: Callable[[dict[str, Params], Segment, Array, Array, Array], Losses]
  segments: int = 1
  after: Callable[[dict[str, Params], Metrics], dict[str, Params]] = lambda params, metrics: params
  clipped_apart: tuple[str, ...] = ()


class Model(NamedTuple):
  """A world model and its actor-critic, composed.

  Attributes:
    spec: number of actions that there is room for, A, and the environment's observation shape.
    latent_shape: (h, w, c).
    conditioning_frames: L.
    init: key -> parameters by component. The key is consumed.
    phases: the updates of one epoch, in order.
    encode: (parameters, observations [B, T, H, W, C] uint8, mask [B, T] bool) -> latents [B, T, h, w, c].
    initial_state: batch size -> state of the policy at the start of an episode.
    policy: (parameters, observations [B, H, W, C] uint8, state) -> (logits [B, A], values [B], state).
    num_actions: parameters -> how many of the A actions the environment has; a number, or [] int32 where there is
      room for more.
    imagine: (parameters, `Segment` of B or 2 B times L frames, keys [B], number of steps, actions [B, steps] or None
      for the policy's) -> `Trajectory`; see `imagination.imagine`.
    dynamics: latents to latents.
    reward_end: latents to rewards and ends.
    actor_critic: latents to actions and values.
    decode: (parameters, latents [B, T, h, w, c]) -> images [B, T, H, W, C] uint8; None where no decoder learns.
  """

  spec: EnvSpec
  latent_shape: tuple[int, int, int]
  conditioning_frames: int
  init: Callable[[Array], dict[str, Params]]
  phases: tuple[Phase, ...]
  encode: Callable[[dict[str, Params], Array, Array], Array]
  initial_state: Callable[[int], LstmState]
  policy: Callable[[dict[str, Params], Array, LstmState], tuple[Array, Array, LstmState]]
  num_actions: Callable[[dict[str, Params]], int | Array]
  imagine: Callable[..., Trajectory]
  dynamics: dynamics_lib.Dynamics
  reward_end: reward_end_lib.RewardEnd
  actor_critic: actor_critic_lib.ActorCritic
  decode: Callable[[dict[str, Params], Array], Array] | None


class Variant(NamedTuple):
  """What a variant is made of.

  Attributes:
    summary: a line that tells it from the others.
    codec: builds the codec.
    dynamics: builds the dynamics on the codec's latents.
    denoiser_trains: which components the dynamics' loss (and a reconstruction) trains.
    reward_end_trains: which components the reward / end loss trains.
    decodes: whether a decoder reconstructs frames; its loss is part of the dynamics' phase.
    dynamics_trains_encoder: whether the dynamics' own loss reaches the encoder; a reconstruction always does.
  """

  summary: str
  codec: Callable[["_Context"], codecs.Codec]
  dynamics: Callable[["_Context", codecs.Codec], dynamics_lib.Dynamics]
  denoiser_trains: tuple[str, ...] = ("encoder", "denoiser")
  reward_end_trains: tuple[str, ...] = ("encoder", "reward_end")
  decodes: bool = False
  dynamics_trains_encoder: bool = True


class _Context(NamedTuple):
  config: Config
  spec: EnvSpec
  lowering: str
  dtype: Any
  num_actions: int


def build(config: Config, spec: EnvSpec, *, packed: bool = False) -> Model:
  """Builds the model that a configuration describes, for an environment.

  Args:
    config: the configuration.
    spec: of the environment.
    packed: whether the model will be mapped over the parameters of several runs.

  Raises:
    UserError: where sizes do not fit (see `config.validate` for most).
  """
  slots = config.env.action_slots
  if slots and slots < spec.num_actions:
    raise UserError(f"env.action_slots={slots} is too small for the {spec.num_actions} actions of {config.env.name}")
  lowering = resolve_convolution(config.precision.convolution, packed=packed)
  dtype = jnp.dtype(config.precision.compute_dtype)
  context = _Context(config, spec._replace(num_actions=slots or spec.num_actions), lowering, dtype, spec.num_actions)
  spec = context.spec
  routes, learned = config.encoder.learns_from, config.encoder.kind == "learned"
  trained = ["encoder", "decoder"] if "reconstruction" in routes else ["encoder"] if "prediction" in routes else []
  variant = Variant(
    "",
    _learned if learned else _identity,
    _diffusion if config.denoiser.kind == "diffusion" else _regression,
    denoiser_trains=(*trained, "denoiser"),
    reward_end_trains=("encoder", "reward_end") if "reward_end" in routes else ("reward_end",),
    decodes="reconstruction" in routes,
    dynamics_trains_encoder="prediction" in routes or "reconstruction" not in routes,
  )
  codec = variant.codec(context)
  updates = (config.training.first_updates.probe, config.training.updates.probe)
  probes = any(updates) and codec.decode is None and not variant.decodes
  return compose(
    spec,
    codec,
    variant.dynamics(context, codec),
    _reward_end(context, codec),
    _actor_critic(context, codec),
    conditioning_frames=config.denoiser.conditioning_frames,
    targets=config.denoiser.targets,
    horizon=config.actor_critic.horizon,
    denoiser_trains=variant.denoiser_trains,
    reward_end_trains=variant.reward_end_trains,
    decoder=_decoder(context, codec) if variant.decodes else None,
    probe=_decoder(context, codec) if probes else None,
    dynamics_trains_encoder=variant.dynamics_trains_encoder,
    target_decay=config.encoder.target_decay,
    final_frames=config.denoiser.final_frames,
    forget_padding=config.actor_critic.forget_padding,
    restart_after_end=config.actor_critic.restart_after_end,
    unroll=config.actor_critic.unroll,
  )


def compose(
  spec: EnvSpec,
  codec: codecs.Codec,
  dynamics: dynamics_lib.Dynamics,
  reward_end: reward_end_lib.RewardEnd,
  actor_critic: actor_critic_lib.ActorCritic,
  *,
  conditioning_frames: int,
  targets: int,
  horizon: int,
  denoiser_trains: tuple[str, ...] = ("encoder", "denoiser"),
  reward_end_trains: tuple[str, ...] = ("encoder", "reward_end"),
  decoder: codecs.Decoder | None = None,
  probe: codecs.Decoder | None = None,
  dynamics_trains_encoder: bool = True,
  target_decay: float = 0.0,
  final_frames: bool = True,
  forget_padding: bool = True,
  restart_after_end: bool = False,
  unroll: int = 1,
) -> Model:
  """Composes a model from its parts.

  Args:
    spec: the environment.
    codec: frames to latents.
    dynamics: latents to latents.
    reward_end: latents to rewards and ends.
    actor_critic: latents to actions and values.
    conditioning_frames: L.
    targets: n, targets of one denoising segment.
    horizon: H, imagined steps of one actor-critic update.
    denoiser_trains: what the dynamics' loss trains; with 'encoder' its gradient reaches the encoder through the
      conditioning latents. 'decoder' belongs here too.
    reward_end_trains: what the reward / end loss trains.
    decoder: if given, its reconstruction of the conditioning frames is part of the dynamics' loss.
    probe: if given, a decoder for the eye: a phase of its own trains it on detached latents, after all others.
    dynamics_trains_encoder: whether the dynamics' own loss reaches the encoder; the reconstruction does anyway.
    target_decay: if positive, targets come from an exponential moving average of the encoder with this decay an
      update, a component 'target_encoder'.
    final_frames: whether the true final frames of episodes are targets too.
    forget_padding: see `imagination.imagine`.
    restart_after_end: whether the actor-critic's trajectories go on from another segment after their first end.
    unroll: see `imagination.imagine`.
  """
  length = conditioning_frames
  show = _show(codec, decoder, probe)

  def init(key: Array) -> dict[str, Params]:
    keys = jax.random.split(key, 4)
    params = {
      "encoder": codec.init(keys[0]),
      "denoiser": dynamics.init(keys[1]),
      "reward_end": reward_end.init(keys[2]),
      "actor_critic": actor_critic.init(keys[3]),
    }
    if decoder is not None:
      params["decoder"] = decoder.init(jax.random.fold_in(key, 4))
    if probe is not None:
      params["probe"] = probe.init(jax.random.fold_in(key, 5))
    if target_decay:
      params["target_encoder"] = jax.tree.map(
        jnp.copy, params["encoder"]
      )  # A copy: leaves that alias cannot be donated.
    return params

  def encode(params: dict[str, Params], observations: Array, mask: Array) -> Array:
    return codecs.encode_frames(codec, params["encoder"], observations, mask)

  def denoiser_losses(
    params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
  ) -> Losses:
    inputs = encode(params, segment.observations[:, :-1], segment.mask[:, :-1])
    if target_decay:
      target_params = {"encoder": params["target_encoder"]}
      clean = encode(target_params, segment.observations[:, length:], segment.mask[:, length:])
    else:
      # The last frame is a target only: it is encoded apart, so that nothing is kept for a gradient that stops.
      last = encode(jax.lax.stop_gradient(params), segment.observations[:, -1:], segment.mask[:, -1:])
      clean = jnp.concatenate([inputs[:, length:], last], axis=1)
    losses = dynamics.losses(
      params["denoiser"],
      inputs if dynamics_trains_encoder else jax.lax.stop_gradient(inputs),
      jax.lax.stop_gradient(clean),
      segment.actions[:, :-1],
      segment.mask[:, length:],
      dynamics.training_noise(keys, shared_key, count),
    )
    terms = dict(losses.terms)
    if decoder is not None:
      terms["reconstruction"] = reconstruction(decoder, params["decoder"], inputs, segment)
    statistics = latent_statistics(inputs, segment.mask[:, :-1], codec.limit)
    return Losses(terms, {**losses.metrics, **statistics})

  def reward_end_losses(
    params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
  ) -> Losses:
    del keys, shared_key, count
    latents = encode(params, segment.observations, segment.mask)
    real = segment.mask[:, :-1] & segment.mask[:, 1:]
    rewards, ends = segment.rewards[:, :-1], segment.ends[:, :-1]
    losses = reward_end.losses(
      params["reward_end"], latents[:, :-1], segment.actions[:, :-1], latents[:, 1:], rewards, ends, real
    )
    # What the policy of replay earned over H steps, beside what the present one imagines that it earns.
    starts = real[:, length - 1].astype(jnp.float32)
    earned = jnp.sum((jnp.sign(rewards) * real)[:, length - 1 :], axis=1)
    metrics = {
      "replay_return": types.Term(earned, starts),
      "replay_end_rate": types.Term(ends.astype(jnp.float32), real.astype(jnp.float32)),
    }
    return losses._replace(metrics={**losses.metrics, **metrics})

  def imagine(
    params: dict[str, Params], segment: Segment, keys: Array, steps: int, actions: Array | None = None
  ) -> Trajectory:
    noise = imagination.draw_noise(dynamics, keys, horizon=steps, num_actions=spec.num_actions)
    latents = encode(jax.lax.stop_gradient(params), segment.observations, segment.mask)
    return imagination.imagine(
      dynamics,
      reward_end,
      actor_critic,
      params,
      latents,
      segment.actions[:, :-1],
      segment.mask,
      noise,
      actions=actions,
      forget_padding=forget_padding,
      unroll=unroll,
    )

  def actor_critic_losses(
    params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array
  ) -> Losses:
    del shared_key, count
    return actor_critic.losses(params["actor_critic"], imagine(params, segment, keys, horizon))

  def probe_losses(params: dict[str, Params], segment: Segment, keys: Array, shared_key: Array, count: Array) -> Losses:
    del keys, shared_key, count
    assert probe is not None
    latents = jax.lax.stop_gradient(encode(params, segment.observations, segment.mask))
    return Losses({"reconstruction": reconstruction(probe, params["probe"], latents, segment)}, {})

  def decode(params: dict[str, Params], latents: Array) -> Array:
    frames = latents.reshape(-1, *codec.latent_shape)
    assert show is not None
    images = show(params, frames)
    return codecs.to_pixels(images).reshape(*latents.shape[:2], *spec.observation_shape)

  def policy(params: dict[str, Params], observations: Array, state: LstmState) -> tuple[Array, Array, LstmState]:
    observations = observations[:, None]
    latents = encode(params, observations, jnp.ones(observations.shape[:2], bool))
    logits, values, state = actor_critic.apply(params["actor_critic"], latents, state)
    return logits[:, 0], values[:, 0], state

  def num_actions(params: dict[str, Params]) -> int | Array:
    own = params["actor_critic"].get("num_actions")
    return spec.num_actions if own is None else own.astype(jnp.int32)

  def average(params: dict[str, Params], metrics: Metrics) -> dict[str, Params]:
    del metrics
    if not target_decay:
      return params
    target = optax.incremental_update(params["encoder"], params["target_encoder"], 1.0 - target_decay)
    return {**params, "target_encoder": target}

  # An autoencoder that the dynamics does not train is another model in the same update.
  apart = () if dynamics_trains_encoder else ("encoder", "decoder")

  def measure(params: dict[str, Params], metrics: Metrics) -> dict[str, Params]:
    params = average(params, metrics)
    before = params["denoiser"]
    measures: dict[str, Callable[[], Array]] = {
      "latent_std": lambda: _channel_std(metrics["latent_gram"]),
      "change_std": lambda: jnp.sqrt(metrics["change_square"]),
    }
    following = {}
    for name in [name for name in measures if name in before]:
      std = jnp.maximum(measures[name](), _LEAST_STD)
      following[name] = jnp.where(before[name] > 0, optax.incremental_update(std, before[name], _STD_RATE), std)
    if not following:
      return params
    return {**params, "denoiser": {**before, **following}}

  phases: tuple[Phase, ...] = (
    Phase(
      "denoiser",
      denoiser_trains,
      length + targets,
      False,
      final_frames,
      denoiser_losses,
      after=measure,
      clipped_apart=apart,
    ),
    Phase("reward_end", reward_end_trains, length + horizon, True, True, reward_end_losses, after=average),
    Phase("actor_critic", ("actor_critic",), length, False, False, actor_critic_losses, 2 if restart_after_end else 1),
  )
  if probe is not None:
    phases += (Phase("probe", ("probe",), 1, False, True, probe_losses),)
  return Model(
    spec,
    codec.latent_shape,
    conditioning_frames,
    init,
    phases,
    encode,
    actor_critic.initial_state,
    policy,
    num_actions,
    imagine,
    dynamics,
    reward_end,
    actor_critic,
    decode if show is not None else None,
  )


_STD_RATE = 0.01
"""How fast the measured standard deviations of the latents and of their change follow, an update."""
_LEAST_STD = 1e-3
"""Collapsed or unchanging latents are not blown up beyond this."""


def _channel_std(gram: Array) -> Array:
  """Root of the mean variance of the channels, from `latent_statistics`'s 'latent_gram'."""
  count = jnp.maximum(gram[0, 0], 1.0)
  variance = jnp.diagonal(gram)[1:] / count - jnp.square(gram[0, 1:] / count)
  return jnp.sqrt(jnp.maximum(jnp.mean(variance), 0.0))


def _show(
  codec: codecs.Codec, decoder: codecs.Decoder | None, probe: codecs.Decoder | None
) -> Callable[[dict[str, Params], Array], Array] | None:
  """Chooses what makes latents visible: nothing learned, the model's own decoder, the probe, or nothing at all."""
  if codec.decode is not None:
    decode = codec.decode
    return lambda params, latents: decode(latents)
  if decoder is not None:
    return lambda params, latents: decoder.decode(params["decoder"], latents)
  if probe is not None:
    return lambda params, latents: probe.decode(params["probe"], latents)
  return None


def latent_statistics(latents: Array, mask: Array, limit: float | None) -> dict[str, Array | types.Term]:
  """Describes the latents of real frames, in sums from which `telemetry.latent_summary` makes its figures.

  Args:
    latents: [B, T, h, w, c].
    mask: [B, T] bool.
    limit: largest absolute value that the codec can give, None where there is no bound.

  Returns:
    'latent_gram': [c + 1, c + 1] float32, sum over real positions of x x^T with x the channels after a leading 1.
    'latent_clamped': share of numbers beyond 0.9 of the limit; absent without a limit.
  """
  latents = jax.lax.stop_gradient(latents)
  weights = jnp.broadcast_to(mask[:, :, None, None], latents.shape[:-1]).astype(jnp.float32)
  augmented = jnp.concatenate([jnp.ones_like(latents[..., :1]), latents], axis=-1)
  gram = jnp.einsum("bthwi,bthwj->ij", augmented * weights[..., None], augmented)
  if limit is None:
    return {"latent_gram": gram}
  clamped = jnp.mean(jnp.abs(latents) > 0.9 * limit, axis=-1)
  return {"latent_gram": gram, "latent_clamped": types.Term(clamped, weights)}


def reconstruction(decoder: codecs.Decoder, params: Params, latents: Array, segment: Segment) -> types.Term:
  """Squared error of the decoded latents [B, T, h, w, c] against the first T frames of the segment, a frame each."""
  batch, time = latents.shape[:2]
  images = codecs.scale_pixels(segment.observations[:, :time])
  decoded = decoder.decode(params, latents.reshape(batch * time, *latents.shape[2:])).reshape(images.shape)
  error = jnp.mean(jnp.square(decoded - images), axis=(2, 3, 4))
  return types.Term(error, segment.mask[:, :time].astype(jnp.float32))


def with_num_actions(params: dict[str, Params], num_actions: int) -> dict[str, Params]:
  """Tells parameters how many actions the environment has, where they have room for more; else changes nothing."""
  own = params["actor_critic"]
  if "num_actions" not in own:
    return params
  return {**params, "actor_critic": {**own, "num_actions": np.asarray(num_actions, np.float32)}}


def count_parameters(params: dict[str, Params]) -> dict[str, int]:
  """Counts the trained numbers of each component; fixed random frequencies and measured scales are not counted."""
  untrained = ("frequencies", "latent_std", "change_std", "num_actions")

  def size(tree: Any) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(leaf.size for path, leaf in leaves if str(path[-1].key) not in untrained)

  return {name: size(tree) for name, tree in params.items()}


def _learned(context: _Context) -> codecs.Codec:
  c = context.config.encoder
  height, width, _ = context.spec.observation_shape
  if height % c.patch or width % c.patch:
    raise UserError(f"encoder.patch={c.patch} does not divide the {height} x {width} frames: take a divisor of both")
  _check_pooling("encoder.downsample", c.downsample, (height // c.patch, width // c.patch))
  return codecs.learned(
    context.spec.observation_shape,
    channels=c.channels,
    downsample=c.downsample,
    patch=c.patch,
    clamp=c.clamp,
    clamp_estimate=context.config.denoiser.clamp_estimate,
    chunk=c.chunk,
    lowering=context.lowering,
    dtype=context.dtype,
  )


def _check_pooling(name: str, downsample: Sequence[bool], shape: tuple[int, int]) -> None:
  if min(shape) >> sum(downsample) < 1:
    raise UserError(f"{name} halves {shape[0]} x {shape[1]} {sum(downsample)} times: halve less often")


def _identity(context: _Context) -> codecs.Codec:
  return codecs.identity(context.spec.observation_shape)


def _decoder(context: _Context, codec: codecs.Codec) -> codecs.Decoder:
  c = context.config.encoder
  return codecs.decoder(
    codec,
    context.spec.observation_shape,
    channels=c.channels,
    downsample=c.downsample,
    patch=c.patch,
    lowering=context.lowering,
    dtype=context.dtype,
  )


def _inner_network(context: _Context) -> InnerNetwork:
  c = context.config.denoiser
  return InnerNetwork(
    num_actions=context.spec.num_actions,
    channels=c.channels,
    depths=c.depths,
    attention=c.attention,
    conditioning_width=c.conditioning_width,
    lowering=context.lowering,
    dtype=context.dtype,
  )


def _targets(context: _Context) -> dict[str, Any]:
  """What every dynamics is told of its targets."""
  c = context.config.denoiser
  return {
    "conditioning_frames": c.conditioning_frames,
    "targets": c.targets,
    "switching": c.switching,
    "sigma_data": c.sigma_data,
    "follow_scale": False,
  }


def _diffusion(context: _Context, codec: codecs.Codec) -> dynamics_lib.Dynamics:
  c, s = context.config.denoiser, context.config.sampler
  sigmas = sampler.karras_sigmas(s.num_steps, sigma_min=s.sigma_min, sigma_max=s.sigma_max, rho=s.rho)
  return dynamics_lib.diffusion(
    codec,
    _inner_network(context),
    target=c.target,
    offset_noise=c.offset_noise,
    sigma_log_mean=c.sigma_log_mean,
    sigma_log_std=c.sigma_log_std,
    sigma_min=c.sigma_min,
    sigma_max=c.sigma_max,
    sampler_sigmas=sigmas,
    sampler_gammas=sampler.churn_gammas(sigmas, churn=s.churn, churn_min=s.churn_min, churn_max=s.churn_max),
    sampler_order=s.order,
    churn_noise=s.churn_noise,
    **_targets(context),
  )


def _regression(context: _Context, codec: codecs.Codec) -> dynamics_lib.Dynamics:
  return dynamics_lib.regression(codec, _inner_network(context), **_targets(context))


def _reward_end(context: _Context, codec: codecs.Codec) -> reward_end_lib.RewardEnd:
  c = context.config.reward_end
  return reward_end_lib.reward_end_model(
    codec.latent_shape,
    num_actions=context.spec.num_actions,
    channels=c.channels,
    depths=c.depths,
    attention=c.attention,
    downsample=c.downsample,
    conditioning_width=c.conditioning_width,
    lstm_width=c.lstm_width,
    lowering=context.lowering,
    dtype=context.dtype,
  )


def _actor_critic(context: _Context, codec: codecs.Codec) -> actor_critic_lib.ActorCritic:
  c = context.config.actor_critic
  _check_pooling("actor_critic.downsample", c.downsample, codec.latent_shape[:2])
  return actor_critic_lib.actor_critic(
    codec.latent_shape,
    num_actions=context.num_actions,
    action_slots=context.config.env.action_slots,
    channels=c.channels,
    downsample=c.downsample,
    lstm_width=c.lstm_width,
    gamma=c.gamma,
    lambda_=c.lambda_,
    entropy_weight=c.entropy_weight,
    value_weight=c.value_weight,
    lowering=context.lowering,
    dtype=context.dtype,
  )


VARIANTS: Mapping[str, Variant] = {
  "jedi": Variant("the paper's model: learned encoder, diffusion", _learned, _diffusion),
  "diamond": Variant(
    "the pixel baseline: images, estimates cut to 256 levels, diffusion",
    _identity,
    _diffusion,
    denoiser_trains=("denoiser",),
    reward_end_trains=("reward_end",),
  ),
  "autoencoder": Variant(
    "a latent space that only reconstruction shapes, as in Horizon Imagination; diffusion",
    _learned,
    _diffusion,
    denoiser_trains=("encoder", "decoder", "denoiser"),
    reward_end_trains=("reward_end",),
    decodes=True,
    dynamics_trains_encoder=False,
  ),
  "mse": Variant("learned encoder, regression of the next latent", _learned, _regression),
  "no_diffusion_gradient": Variant(
    "learned encoder that only rewards and ends shape; diffusion", _learned, _diffusion, denoiser_trains=("denoiser",)
  ),
  "decoder_gradient": Variant(
    "learned encoder that reconstruction shapes as well; diffusion",
    _learned,
    _diffusion,
    denoiser_trains=("encoder", "decoder", "denoiser"),
    decodes=True,
  ),
}
"""Every variant by name; `config.VARIANTS` holds what each changes in the settings."""


def table(spec: EnvSpec, *, env: str, preset: str) -> str:
  """Lists the variants as a Markdown table, with the parameters of each component for an environment and preset."""
  components = ("encoder", "decoder", "denoiser", "reward_end", "actor_critic")
  lines = [
    "| command | codec and dynamics | the encoder learns from | " + " | ".join((*components, "all")) + " |",
    "|" + "---|" * (len(components) + 4),
  ]
  for name, variant in VARIANTS.items():
    config = make_config(env=env, variant=name, preset=preset)
    counts = count_parameters(jax.eval_shape(build(config, spec).init, jax.random.key(0)))
    numbers = (f"{counts[component]:,}" if counts.get(component) else "-" for component in components)
    lines.append(
      f"| `--variant={name}` | {variant.summary} | {_route(variant)} | "
      + " | ".join((*numbers, f"{sum(counts.values()):,}"))
      + " |"
    )
  return "\n".join(lines)


def _route(variant: Variant) -> str:
  """Names the losses whose gradient reaches the encoder."""
  denoiser = "encoder" in variant.denoiser_trains
  routes = {
    "prediction": denoiser and variant.dynamics_trains_encoder,
    "reward / end": "encoder" in variant.reward_end_trains,
    "reconstruction": denoiser and variant.decodes,
  }
  return " + ".join(name for name, there in routes.items() if there) or "-"
