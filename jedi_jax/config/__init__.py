"""Configuration: frozen records of typed settings, presets, overrides from text, validation.

Every setting carries a tag that says whose value its default is:

  C  certain: stated by the JEDI papers (arXiv:2505.19698, arXiv:2605.13013).
  R  reported: attributed to the JEDI papers by a third party.
  D  DIAMOND's value (arXiv:2405.12399), taken over where JEDI's is not known.
  O  our choice.

The defaults are preset `paper`. `make_config` builds a configuration from a variant, a preset and overrides; any
`Config` that exists has passed validation. Configuration objects stop at the builders in `models` and `training`:
ops, nn and losses take plain arguments.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jedi_jax import envs
from jedi_jax.errors import UserError, nearest

T = TypeVar("T")

TAGS = {"C": "certain, from the paper", "R": "reported for the paper", "D": "DIAMOND's", "O": "ours"}

_WIDEST = 2**16
"""Bound of channels and widths: beyond what any device could hold, and far below where sizes overflow."""
_MOST_ENTRIES = 32
"""Bound of the length of tuples: each stage of a network takes a second to trace."""
_LARGEST, _LEAST = 3.4e38, 1.2e-38
"""What float32 can tell from infinity and from 0; programs compute in it."""


def setting(
  default: Any,
  tag: str,
  doc: str,
  *,
  low: float | None = None,
  above: float | None = None,
  high: float | None = None,
  choices: tuple[str, ...] | None = None,
) -> Any:
  """Declares one field of a configuration record.

  Args:
    default: the value of preset `paper` with variant `jedi`.
    tag: one of `TAGS`.
    doc: what the setting is, with its unit.
    low: smallest allowed value, of each element where the value is a tuple.
    above: like `low`, but the bound itself is not allowed.
    high: largest allowed value.
    choices: the allowed strings.
  """
  if tag not in TAGS:
    raise ValueError(f"tag {tag!r} is not one of {', '.join(TAGS)}")
  return dataclasses.field(
    default=default,
    metadata={"tag": tag, "doc": doc, "low": low, "above": above, "high": high, "choices": choices},
  )


def documented(cls: type[T]) -> type[T]:
  """Appends the settings of a configuration record, with defaults and tags, to its docstring."""
  lines = []
  for field in dataclasses.fields(cls):  # type: ignore[arg-type]
    if "tag" in field.metadata:
      lines.append(f"  {field.name}: {field.metadata['doc']} Default {field.default!r} [{field.metadata['tag']}].")
    else:
      given: Any = field.default
      changed = [
        f"{inner.name}={getattr(given, inner.name)!r}"
        for inner in dataclasses.fields(given)
        if getattr(given, inner.name) != inner.default
      ]
      lines.append(f"  {field.name}: `{type(given).__name__}`" + (f" with {', '.join(changed)}." if changed else "."))
  cls.__doc__ = f"{cls.__doc__}\n\nAttributes:\n" + "\n".join(lines)
  return cls


@documented
@dataclasses.dataclass(frozen=True)
class EnvConfig:
  """The environment that is learned."""

  name: str = setting("atari/Breakout", "O", "'atari/<Game>' for any Atari game of EnvPool, or 'catch'.")
  num_envs: int = setting(1, "D", "Environments that collect, each its own stream of replay.", low=1, high=1024)
  action_slots: int = setting(
    0,
    "O",
    "Actions that the networks have room for, so that games with fewer can share a program; 0 for the game's own.",
    low=0,
    high=1_000,
  )
  life_loss_ends: bool = setting(True, "D", "Whether losing a life ends a training episode; the game goes on.")
  max_episode_steps: int = setting(
    27_000, "C", "Time limit of a game in agent steps (108,000 frames).", low=1, high=10**9
  )


@documented
@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The learned encoder from pixels to latents."""

  channels: tuple[int, ...] = setting(
    (32, 32, 32, 16), "R", "Channels of the stages; the last are the latent's.", low=1, high=_WIDEST
  )
  downsample: tuple[bool, ...] = setting((True, True, True, False), "R", "Whether a stage ends in 2 x 2 max pooling.")
  patch: int = setting(
    1,
    "O",
    "Side of the squares of pixels that are stacked on the channels before the first stage; 1 for none.",
    low=1,
    high=64,
  )
  clamp: float = setting(3.0, "R", "Scale s of the soft clamp s tanh(z / s) on latents; 0 for none.", low=0)
  target_decay: float = setting(
    0.0, "R", "Decay an update of the moving average of the encoder that gives the targets; 0 for none.", low=0, high=1
  )
  kind: str = setting("learned", "C", "Which.", choices=("learned", "identity"))
  learns_from: tuple[str, ...] = setting(("prediction", "reward_end"), "R", "Losses that train it.")
  learning_rate_factor: float = setting(
    0.3, "R", "Encoder's learning rate over that of the part trained with it.", low=0
  )
  chunk: int = setting(
    64,
    "O",
    "Frames encoded at a time, whose activations are computed anew for the gradient, for less "
    "memory and more operations; 0 for all at once.",
    low=0,
    high=10**6,
  )


@documented
@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with clipping by global norm and a linear warm-up from 0."""

  learning_rate: float = setting(1e-4, "D", "Step size after the warm-up.", above=0)
  epsilon: float = setting(1e-8, "D", "Adam's epsilon, outside the root.", above=0)
  weight_decay: float = setting(1e-2, "D", "Decoupled decay on kernels (not on biases, gains and embeddings).", low=0)
  max_grad_norm: float = setting(100.0, "D", "Bound of the global norm of the gradient.", above=0)
  warmup_updates: int = setting(
    100, "D", "Updates of the linear warm-up; the first one has step size 0.", low=0, high=10**9
  )


@documented
@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
  """The EDM denoiser: inner network, noise levels and training targets."""

  channels: tuple[int, ...] = setting((160,), "R", "Channels of the U-Net's levels.", low=1, high=_WIDEST)
  depths: tuple[int, ...] = setting((1,), "R", "Residual blocks a side on each level.", low=1, high=64)
  attention: tuple[bool, ...] = setting((False,), "D", "Self-attention on each level (the middle always has it).")
  conditioning_width: int = setting(
    256, "D", "Width of the embedding of noise level and past actions.", low=2, high=_WIDEST
  )
  conditioning_frames: int = setting(4, "C", "Past frames L that a prediction is conditioned on.", low=1, high=256)
  targets: int = setting(2, "D", "Successive targets in a training segment of L + targets frames.", low=1, high=64)
  final_frames: bool = setting(
    True, "O", "Whether the true final frame of an episode is a target too; DIAMOND leaves it out."
  )
  switching: str = setting(
    "random",
    "R",
    "Whether later targets are conditioned on the denoiser's estimates or on the encoder's latents: one fair coin a "
    "batch, alternating batches, or always the one or the other.",
    choices=("random", "alternate", "always_encoder", "always_denoiser"),
  )
  clamp_estimate: bool = setting(
    True, "R", "Whether the encoder's soft clamp also applies to the denoiser's estimate (the loss is taken after it)."
  )
  target: str = setting(
    "latent",
    "O",
    "What is diffused: the next latent, or its change from the last one in units of the measured size of changes "
    "(then leave `clamp_estimate` off).",
    choices=("latent", "change"),
  )
  sigma_data: float = setting(0.5, "O", "Standard deviation of the data assumed by the preconditioning.", above=0)
  kind: str = setting("diffusion", "C", "Which.", choices=("diffusion", "regression"))
  offset_noise: float = setting(0.3, "O", "Standard deviation of noise shared by a channel's positions.", low=0)
  sigma_log_mean: float = setting(-0.4, "D", "Mean of ln sigma in training.")
  sigma_log_std: float = setting(1.2, "D", "Standard deviation of ln sigma in training.", low=0)
  sigma_min: float = setting(2e-3, "D", "Least noise level in training.", above=0)
  sigma_max: float = setting(20.0, "D", "Largest noise level in training.", above=0, high=1e6)
  optimizer: OptimizerConfig = OptimizerConfig(max_grad_norm=1.0)


@documented
@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """The sampler of the reverse process (Karras et al. 2022, arXiv:2206.00364)."""

  num_steps: int = setting(3, "R", "Denoising steps for one frame.", low=1, high=1_000)
  sigma_min: float = setting(2e-3, "D", "Last positive noise level.", above=0)
  sigma_max: float = setting(5.0, "D", "First noise level.", above=0, high=1e6)
  rho: float = setting(7.0, "D", "Curvature of the schedule.", low=0.1, high=1e3)
  order: int = setting(1, "D", "1 for Euler's method, 2 for Heun's.", low=1, high=2)
  churn: float = setting(0.0, "R", "Amount of noise added back; 1 in the paper's stochastic-Atari experiment.", low=0)
  churn_min: float = setting(0.0, "D", "Least noise level at which churn acts.", low=0)
  churn_max: float = setting(math.inf, "D", "Largest noise level at which churn acts.", low=0)
  churn_noise: float = setting(1.0, "D", "Standard deviation of the noise that churn adds.", low=0)


@documented
@dataclasses.dataclass(frozen=True)
class RewardEndConfig:
  """The model of reward and end."""

  channels: tuple[int, ...] = setting(
    (32, 32, 32, 32), "R", "Channels of the levels of residual blocks.", low=1, high=_WIDEST
  )
  depths: tuple[int, ...] = setting((2, 2, 2, 2), "R", "Residual blocks on each level.", low=1, high=64)
  attention: tuple[bool, ...] = setting(
    (False,) * 4, "D", "Self-attention on each level (the last pair always has it)."
  )
  downsample: bool = setting(False, "R", "Whether levels halve the resolution; not on 8 x 8 latents.")
  conditioning_width: int = setting(128, "D", "Width of the action embedding.", low=1, high=_WIDEST)
  lstm_width: int = setting(512, "D", "Width of the LSTM and of the head.", low=1, high=_WIDEST)
  optimizer: OptimizerConfig = OptimizerConfig()


@documented
@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
  """The policy and value, and how they learn in imagination."""

  channels: tuple[int, ...] = setting(
    (), "O", "Channels of convolution stages before the LSTM; none on latents.", low=1, high=_WIDEST
  )
  downsample: tuple[bool, ...] = setting((), "O", "Whether a stage ends in 2 x 2 max pooling.")
  lstm_width: int = setting(512, "O", "Width of the LSTM.", low=1, high=_WIDEST)
  forget_padding: bool = setting(
    True, "O", "Whether the burn-in starts with an empty state behind padding, as real episodes do; not in DIAMOND."
  )
  restart_after_end: bool = setting(
    False, "O", "Whether a trajectory goes on from other frames of replay after its first imagined end, else it is cut."
  )
  horizon: int = setting(15, "R", "Imagined steps H.", low=1, high=10_000)
  unroll: int = setting(
    1,
    "O",
    "Imagined steps that a round of the compiled loop holds: more compile longer and launch less.",
    low=1,
    high=1_000,
  )
  gamma: float = setting(0.985, "R", "Discount.", low=0, high=1)
  lambda_: float = setting(0.95, "R", "Mixing of the lambda-returns.", low=0, high=1)
  entropy_weight: float = setting(0.001, "R", "Weight of the entropy bonus, in nats.", low=0)
  value_weight: float = setting(1.0, "R", "Weight of the squared error of the value.", low=0)
  optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)


@documented
@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """A decoder that learns beside the agent on detached latents, so that people can look at its dreams.

  It changes nothing else, and a variant that can show its latents anyway has none.
  """

  strips: int = setting(
    4, "O", "Segments whose imagined frames TensorBoard shows under the real ones at every evaluation.", low=0, high=64
  )
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)


@documented
@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """Collection from the real environment; a step is one agent step (4 frames of Atari)."""

  total_steps: int = setting(100_000, "C", "Environment steps in all (400,000 frames of Atari).", low=1, high=10**9)
  steps_per_epoch: int = setting(100, "D", "Environment steps an epoch, over all environments.", low=1, high=10**9)
  first_epoch_min_steps: int = setting(
    5_000, "D", "Environment steps before the first update, at least.", low=1, high=10**9
  )
  first_epoch_max_steps: int = setting(
    10_000, "D", "Environment steps before the first update, at most.", low=1, high=10**9
  )
  first_epoch_rewards: int = setting(
    10, "D", "Rewards of the two rarer signs that end the first collection.", low=0, high=10**9
  )
  epsilon: float = setting(0.01, "D", "Probability of a uniformly random action.", low=0, high=1)
  overlap: bool = setting(
    False,
    "O",
    "Whether the host's CPU takes an epoch's steps while the device trains on those before them, which then come into "
    "replay an epoch later (the last ones after the last update, where `training.final_epochs` is 0).",
  )


@documented
@dataclasses.dataclass(frozen=True)
class ReplayConfig:
  """The ring of frames on the device."""

  capacity: int = setting(100_000, "D", "Frames kept, over all environments.", low=2, high=10**8)
  final_frames: int = setting(
    10_000, "O", "Room kept besides for the true final frames of episodes.", low=0, high=10**8
  )
  age_weights: tuple[float, ...] = setting(
    (0.1, 0.1, 0.1, 0.7), "D", "Probability of each group of episodes, oldest first; they sum to 1.", low=0
  )


@documented
@dataclasses.dataclass(frozen=True)
class Updates:
  """A number of updates of each component."""

  denoiser: int = setting(400, "D", "Updates of the denoiser.", low=0, high=10**9)
  reward_end: int = setting(400, "D", "Updates of the reward / end model.", low=0, high=10**9)
  actor_critic: int = setting(400, "D", "Updates of the actor-critic.", low=0, high=10**9)
  probe: int = setting(0, "O", "Updates of the probe decoder; 0 here and there for none.", low=0, high=10**9)


@documented
@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The training loop."""

  batch_size: int = setting(
    32,
    "R",
    "Segments or imagined trajectories of an update, over all devices (the paper: 32 or 64).",
    low=1,
    high=10**6,
  )
  updates: Updates = Updates()
  first_updates: Updates = Updates(10_000, 10_000, 5_000)
  final_epochs: int = setting(50, "D", "Epochs after the last collection.", low=0, high=10**9)
  updates_per_call: int = setting(
    1_200,
    "O",
    "Updates in one device call at most: an epoch within it is one call, a longer one several.",
    low=1,
    high=10**9,
  )
  time_phases_every: int = setting(
    10, "O", "Every so many epochs each phase is its own call, so that its time is known.", low=1, high=10**9
  )
  max_skipped: int = setting(
    20,
    "O",
    "Updates of a phase in a row that may be skipped for a loss or gradient that is not finite.",
    low=0,
    high=10**9,
  )
  collapse_std: float = setting(
    0.05, "O", "Standard deviation of the latents below which a warning says that they have collapsed.", low=0.0
  )
  collapse_rank: float = setting(1.5, "O", "Effective rank of the latents below which it says the same.", low=0.0)


@documented
@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Evaluation on whole games: no life-loss ends, epsilon 0, sampled actions."""

  episodes: int = setting(100, "C", "Games of the final evaluation.", low=1, high=10**6)
  interval_epochs: int = setting(100, "O", "Epochs between evaluations during training; 0 for none.", low=0, high=10**9)
  interval_episodes: int = setting(10, "O", "Games of an evaluation during training.", low=1, high=10**6)
  num_envs: int = setting(10, "O", "Environments that evaluate, each a fixed number of games.", low=1, high=1024)
  max_episode_steps: int = setting(27_000, "C", "Time limit of a game in agent steps.", low=1, high=10**9)


@documented
@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints of the whole training state."""

  interval_epochs: int = setting(
    25, "O", "Epochs between checkpoints; one is always written at the end.", low=1, high=10**9
  )
  keep: int = setting(2, "O", "Newest checkpoints kept.", low=1, high=10**9)


@documented
@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
  """Number formats and kernels."""

  compute_dtype: str = setting(
    "float32",
    "O",
    "Format of activations and products; parameters, losses and group-norm statistics stay float32.",
    choices=("float32", "bfloat16"),
  )
  convolution: str = setting(
    "auto",
    "O",
    "Lowering of 3 x 3 convolutions (see nn/blocks.py): 'auto' takes 'matmul_gradient' on a CPU and 'lax' elsewhere.",
    choices=("auto", "lax", "matmul_gradient", "matmul"),
  )


@documented
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run but its directory."""

  variant: str = setting("jedi", "O", "Which world model; see VARIANTS.")
  preset: str = setting("paper", "O", "Name of the preset that the other settings started from.")
  seed: int = setting(0, "O", "Seed of parameters, environments, exploration and batches.", low=0, high=2**31 - 1)
  env: EnvConfig = EnvConfig()
  encoder: EncoderConfig = EncoderConfig()
  denoiser: DenoiserConfig = DenoiserConfig()
  sampler: SamplerConfig = SamplerConfig()
  reward_end: RewardEndConfig = RewardEndConfig()
  actor_critic: ActorCriticConfig = ActorCriticConfig()
  probe: ProbeConfig = ProbeConfig()
  collect: CollectConfig = CollectConfig()
  replay: ReplayConfig = ReplayConfig()
  training: TrainingConfig = TrainingConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  precision: PrecisionConfig = PrecisionConfig()

  def __post_init__(self) -> None:
    validate(self)


VARIANTS: Mapping[str, Mapping[str, Any]] = {
  "jedi": {},
  "diamond": {
    "denoiser.channels": (64, 64, 64, 64),
    "denoiser.depths": (2, 2, 2, 2),
    "denoiser.attention": (False, False, False, False),
    "denoiser.switching": "always_denoiser",
    "denoiser.final_frames": False,
    "actor_critic.forget_padding": False,
    "actor_critic.restart_after_end": True,
    "denoiser.offset_noise": 0.3,
    "denoiser.sigma_data": 0.5,
    "encoder.kind": "identity",
    "encoder.learns_from": (),
    "denoiser.target": "latent",
    "denoiser.clamp_estimate": True,
    "reward_end.downsample": True,
    "actor_critic.channels": (32, 32, 64, 64),
    "actor_critic.downsample": (True, True, True, True),
  },
  "autoencoder": {"encoder.learns_from": ("reconstruction",)},
  "mse": {"denoiser.kind": "regression"},
  "no_diffusion_gradient": {"encoder.learns_from": ("reward_end",)},
  "decoder_gradient": {"encoder.learns_from": ("prediction", "reward_end", "reconstruction")},
}
"""What a variant changes in the `paper` settings. `models/variants.py` composes the parts."""

_SMALL_WORLD = {
  "encoder.patch": 2,  # Half of the time of all updates went into the encoder's first stage.
  "encoder.channels": (16, 32, 16),
  "encoder.downsample": (True, True, False),
  "denoiser.channels": (64,),
  "denoiser.conditioning_width": 128,
  "denoiser.optimizer.learning_rate": 1e-3,
  "reward_end.channels": (16, 16),
  "reward_end.depths": (1, 1),
  "reward_end.attention": (False, False),
  "reward_end.conditioning_width": 64,
  "reward_end.lstm_width": 256,
  "reward_end.optimizer.learning_rate": 3e-4,
  "actor_critic.lstm_width": 256,
  "actor_critic.horizon": 10,
  "actor_critic.optimizer.learning_rate": 3e-4,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
  # All constants of the paper.
  "paper": {},
  # A width that learns an Atari game on two CPU cores in an hour or two. Real steps are cheap there and updates are
  # not: with fewer steps the reward model learns them by heart.
  "small": {
    **_SMALL_WORLD,
    "denoiser.target": "change",  # Within these few updates latents as targets predict worse than copying does.
    "denoiser.clamp_estimate": False,
    "actor_critic.entropy_weight": 0.003,
    "env.num_envs": 4,
    "collect.total_steps": 28_000,
    "collect.first_epoch_min_steps": 12_000,
    "collect.first_epoch_max_steps": 12_000,
    "collect.steps_per_epoch": 400,
    "replay.capacity": 28_000,
    "replay.final_frames": 3_000,
    "training.batch_size": 16,
    "training.first_updates.denoiser": 2_500,
    "training.first_updates.reward_end": 2_500,
    "training.first_updates.actor_critic": 400,
    "training.first_updates.probe": 300,
    "training.updates.denoiser": 100,
    "training.updates.reward_end": 60,
    "training.updates.actor_critic": 120,
    "training.updates.probe": 20,
    "training.updates_per_call": 300,
    "training.final_epochs": 0,
    "evaluation.episodes": 30,
    "evaluation.interval_epochs": 10,
    "evaluation.interval_episodes": 8,
    "evaluation.num_envs": 8,
    "checkpoint.interval_epochs": 5,
  },
  # The README's first command: a whole run within ten minutes on two CPU cores.
  "cpu": {
    **_SMALL_WORLD,
    "denoiser.channels": (48,),
    "collect.total_steps": 2_400,
    "collect.first_epoch_min_steps": 800,
    "collect.first_epoch_max_steps": 1_200,
    "collect.steps_per_epoch": 200,
    "replay.capacity": 3_000,
    "replay.final_frames": 500,
    "training.batch_size": 8,
    "training.first_updates.denoiser": 300,
    "training.first_updates.reward_end": 300,
    "training.first_updates.actor_critic": 100,
    "training.first_updates.probe": 100,
    "training.updates.denoiser": 50,
    "training.updates.reward_end": 50,
    "training.updates.actor_critic": 50,
    "training.updates.probe": 50,
    "training.updates_per_call": 50,
    "training.final_epochs": 0,
    "training.time_phases_every": 1,
    "evaluation.episodes": 8,
    "evaluation.interval_epochs": 4,
    "evaluation.interval_episodes": 4,
    "evaluation.num_envs": 4,
    "evaluation.max_episode_steps": 2_000,
    "checkpoint.interval_epochs": 2,
  },
  # Learns Catch within twenty minutes on two CPU cores.
  "catch": {
    "env.name": "catch",
    "encoder.patch": 2,
    "encoder.channels": (16, 8),
    "encoder.downsample": (True, False),
    "denoiser.channels": (32,),
    "denoiser.conditioning_width": 64,
    "denoiser.target": "change",  # With latents as targets policies settled on wrong dreams.
    "denoiser.clamp_estimate": False,
    "denoiser.optimizer.learning_rate": 1e-3,
    "reward_end.channels": (16,),
    "reward_end.depths": (1,),
    "reward_end.attention": (False,),
    "reward_end.conditioning_width": 32,
    "reward_end.lstm_width": 64,
    "reward_end.optimizer.learning_rate": 3e-4,
    "actor_critic.lstm_width": 64,
    "actor_critic.horizon": 9,  # A game.
    "actor_critic.optimizer.learning_rate": 1e-3,
    "actor_critic.entropy_weight": 0.02,
    "env.num_envs": 8,
    "collect.first_epoch_min_steps": 864,
    "collect.first_epoch_max_steps": 864,
    "collect.steps_per_epoch": 72,
    "collect.total_steps": 2_664,
    "replay.capacity": 3_000,
    "replay.final_frames": 400,
    "training.batch_size": 16,
    "training.first_updates.denoiser": 1_200,
    "training.first_updates.reward_end": 800,
    "training.first_updates.actor_critic": 0,  # No policy before there are rewards to imagine.
    "training.first_updates.probe": 200,
    "training.updates.denoiser": 50,
    "training.updates.reward_end": 50,
    "training.updates.actor_critic": 50,
    "training.updates.probe": 20,
    "training.updates_per_call": 200,
    "training.final_epochs": 0,
    "evaluation.episodes": 100,
    "evaluation.interval_epochs": 5,
    "evaluation.interval_episodes": 30,
    "checkpoint.interval_epochs": 10,
  },
  # Seconds: for tests and for trying things out.
  "debug": {
    "encoder.channels": (8, 8, 8, 4),
    "denoiser.channels": (8,),
    "denoiser.conditioning_width": 16,
    "reward_end.channels": (8,),
    "reward_end.depths": (1,),
    "reward_end.attention": (False,),
    "reward_end.conditioning_width": 8,
    "reward_end.lstm_width": 16,
    "actor_critic.lstm_width": 16,
    "actor_critic.horizon": 4,
    "collect.total_steps": 120,
    "collect.first_epoch_min_steps": 60,
    "collect.first_epoch_max_steps": 60,
    "collect.steps_per_epoch": 20,
    "replay.capacity": 200,
    "replay.final_frames": 40,
    "training.batch_size": 4,
    "training.first_updates.denoiser": 4,
    "training.first_updates.reward_end": 4,
    "training.first_updates.actor_critic": 4,
    "training.updates.denoiser": 2,
    "training.updates.reward_end": 2,
    "training.updates.actor_critic": 2,
    "training.final_epochs": 1,
    "training.time_phases_every": 2,
    "evaluation.episodes": 2,
    "evaluation.interval_epochs": 2,
    "evaluation.interval_episodes": 2,
    "evaluation.num_envs": 2,
    "evaluation.max_episode_steps": 40,
    "checkpoint.interval_epochs": 1,
    "probe.strips": 0,
  },
}
"""What a preset changes in the `paper` settings, but for what the variant sets."""

_SMALL_PIXELS = {
  "denoiser.channels": (16, 16, 32, 32),
  "denoiser.depths": (1, 1, 1, 1),
  "reward_end.channels": (8, 16, 16, 16),
  "reward_end.depths": (1, 1, 1, 1),
  "reward_end.attention": (False, False, False, False),
  "actor_critic.channels": (8, 16, 16, 32),
}

VARIANT_PRESETS: Mapping[tuple[str, str], Mapping[str, Any]] = {
  ("diamond", "small"): _SMALL_PIXELS,
  ("diamond", "cpu"): _SMALL_PIXELS,
  ("diamond", "catch"): {
    "denoiser.channels": (16, 32),
    "denoiser.depths": (1, 1),
    "denoiser.attention": (False, False),
    "reward_end.channels": (8, 16),
    "reward_end.depths": (1, 1),
    "reward_end.attention": (False, False),
    "actor_critic.channels": (8, 16, 16),
    "actor_critic.downsample": (True, True, True),
  },
  ("diamond", "debug"): {
    "denoiser.channels": (8, 8),
    "denoiser.depths": (1, 1),
    "denoiser.attention": (False, False),
    "reward_end.channels": (8, 8),
    "reward_end.depths": (1, 1),
    "reward_end.attention": (False, False),
    "actor_critic.channels": (8, 8, 8),
    "actor_critic.downsample": (True, True, True),
  },
}
"""What a preset changes besides where its sizes do not suit a variant."""


def make_config(
  *,
  env: str | None = None,
  variant: str = "jedi",
  preset: str = "paper",
  seed: int = 0,
  overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Config:
  """Builds a validated configuration.

  Args:
    env: name of the environment, the preset's if None; with a random frame skip the sampler's churn is 1 unless
      overridden.
    variant: a key of `VARIANTS`.
    preset: a key of `PRESETS`.
    seed: non-negative seed.
    overrides: 'path=value' texts, such as 'actor_critic.horizon=10', or a mapping from paths to values; applied last.

  Raises:
    UserError: for an unknown name or path (with the nearest ones), a value of the wrong type or an impossible value.
  """
  _check_names(variant, preset)
  if not isinstance(overrides, Mapping):
    overrides = dict(split_override(text) for text in overrides)
  # What makes a variant what it is stands against a preset; only `VARIANT_PRESETS` may undo it.
  values: dict[str, Any] = {**PRESETS[preset], **VARIANTS[variant], **VARIANT_PRESETS.get((variant, preset), {})}
  values |= {"variant": variant, "preset": preset, "seed": seed}
  values["env.name"] = env = env or values.get("env.name", EnvConfig.name)
  if envs.is_stochastic(env):
    values["sampler.churn"] = 1.0  # As in the paper's stochastic-Atari experiment.
  return override(Config(), {**values, **overrides})


def override(config: Config, values: Mapping[str, Any]) -> Config:
  """Returns `config` with the settings at the given dotted paths replaced, all at once.

  Args:
    config: where to start.
    values: from paths to values; a text is parsed as the field's type, anything else must have it.

  Raises:
    UserError: as `make_config`.
  """
  known = dict(settings(type(config)))
  tree: dict[str, Any] = {}
  for path, value in values.items():
    if path not in known:
      raise UserError(f"unknown setting {path!r}{nearest(path, known)}")
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = _convert(path, value, known[path].type)
  return _replace(config, tree)


def settings(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
  """Yields (dotted path, field) of every setting of a configuration class; `field.type` is its resolved type."""
  hints = typing.get_type_hints(cls)
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(hints[field.name]):
      yield from settings(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
    else:
      field.type = hints[field.name]
      yield prefix + field.name, field


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a nested dictionary of JSON values (infinity as 'inf'), the inverse of `from_dict`."""

  def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
      return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
      return list(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

  return plain(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Turns a nested dictionary into one from dotted paths to values."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
  return flat


def from_dict(tree: Mapping[str, Any]) -> Config:
  """Builds a configuration from `to_dict`'s form.

  Raises:
    UserError: for an unknown path, or a wrong or impossible value.
  """
  return override(Config(), flatten(tree))


def describe(config: Config) -> str:
  """Lists every setting as a Markdown table; values that differ from preset `paper` are bold."""
  values, paper = flatten(to_dict(config)), flatten(to_dict(Config()))
  lines = [
    "# Settings",
    "",
    "Tags tell whose value the default is: " + "; ".join(f"{tag} {meaning}" for tag, meaning in TAGS.items()) + ".",
    f"Variant `{config.variant}`, preset `{config.preset}`; what differs from preset `paper` is bold.",
    "",
    "| setting | value | tag | what |",
    "|---|---|---|---|",
  ]
  for path, field in settings(type(config)):
    value = json.dumps(values[path])
    value = value if values[path] == paper[path] else f"**{value}**"
    lines.append(f"| `{path}` | {value} | {field.metadata['tag']} | {field.metadata['doc']} |")
  return "\n".join(lines)


def room_for(names: Sequence[str]) -> int:
  """Returns `env.action_slots` for games that share a program: the largest number of actions, 0 if all have the same.

  Raises:
    UserError: for an unknown name.
  """
  numbers = {envs.spec(name).num_actions for name in names}
  return max(numbers) if len(numbers) > 1 else 0


def differences(old: Config, new: Config) -> list[str]:
  """Returns 'path: old value -> new value' for every setting that differs."""
  before, after = flatten(to_dict(old)), flatten(to_dict(new))
  return [f"{path}: {before[path]} -> {after[path]}" for path in before if before[path] != after[path]]


def validate(config: Config) -> None:
  """Checks every bound and what settings demand of one another.

  Raises:
    UserError: one line that names the setting and the fix.
  """
  for path, field in settings(type(config)):
    value: Any = config
    for name in path.split("."):
      value = getattr(value, name)
    converted = _convert(path, value, field.type)
    if repr(converted) != repr(value):  # A text, a list for a tuple or an integer for a float.
      raise UserError(f"{path}={value!r} is not of its declared type: write {converted!r}")
    _check_bounds(path, value, field.metadata)
  envs.validate(config.env.name)
  _check_names(config.variant, config.preset)

  flat = flatten(to_dict(config))

  def same_length(first: str, second: str) -> None:
    a, b = flat[first], flat[second]
    if len(a) != len(b):
      raise UserError(f"{first} has {len(a)} entries and {second} has {len(b)}: give both the same length")

  same_length("encoder.channels", "encoder.downsample")
  same_length("denoiser.channels", "denoiser.depths")
  same_length("denoiser.channels", "denoiser.attention")
  same_length("reward_end.channels", "reward_end.depths")
  same_length("reward_end.channels", "reward_end.attention")
  same_length("actor_critic.channels", "actor_critic.downsample")
  for path, channels in (
    ("encoder.channels", config.encoder.channels),
    ("denoiser.channels", config.denoiser.channels),
    ("reward_end.channels", config.reward_end.channels),
    ("replay.age_weights", config.replay.age_weights),
  ):
    if not channels:
      raise UserError(f"{path} is empty: give at least one entry")
  for path, channels in (
    ("encoder.channels", config.encoder.channels),
    ("denoiser.channels", config.denoiser.channels),
    ("reward_end.channels", config.reward_end.channels),
    ("actor_critic.channels", config.actor_critic.channels),
  ):
    for count in channels:
      if count > 32 and count % (count // 32):
        raise UserError(
          f"{path}: {count} channels cannot be split into {count // 32} norm groups: take a multiple of 32"
        )
  for path, channels in (
    ("denoiser.channels", config.denoiser.channels),
    ("reward_end.channels", config.reward_end.channels),
  ):
    for count in channels:
      if count > 8 and count % 8:
        raise UserError(f"{path}: {count} channels cannot be split into attention heads of 8: take a multiple of 8")
  # On the way up of the U-Net a level's channels meet those of the way down, of this level and of the one above.
  levels = config.denoiser.channels
  for first, second in ((levels[max(0, i + below)], count) for i, count in enumerate(levels) for below in (0, -1)):
    met = first + second
    if met > 32 and met % (met // 32):
      raise UserError(
        f"denoiser.channels: {first} and {second} channels meet in {met}, which cannot be split into {met // 32} norm "
        "groups: take multiples of 32"
      )
  if config.denoiser.conditioning_width % config.denoiser.conditioning_frames:
    raise UserError(
      f"denoiser.conditioning_width={config.denoiser.conditioning_width} is not a multiple of "
      f"denoiser.conditioning_frames={config.denoiser.conditioning_frames}: each past action takes an equal share"
    )
  if config.denoiser.conditioning_width % 2:
    raise UserError(f"denoiser.conditioning_width={config.denoiser.conditioning_width} is odd: make it even")
  for low, high in (
    ("denoiser.sigma_min", "denoiser.sigma_max"),
    ("sampler.sigma_min", "sampler.sigma_max"),
    ("sampler.churn_min", "sampler.churn_max"),
    ("collect.first_epoch_min_steps", "collect.first_epoch_max_steps"),
  ):
    if float(flat[low]) > float(flat[high]):
      raise UserError(f"{low}={flat[low]} exceeds {high}={flat[high]}: lower the one or raise the other")
  total = sum(config.replay.age_weights)
  if abs(total - 1) > 1e-6:
    raise UserError(f"replay.age_weights sum to {total}: make them sum to 1")
  if config.collect.first_epoch_max_steps > config.collect.total_steps:
    raise UserError(
      f"collect.first_epoch_max_steps={config.collect.first_epoch_max_steps} exceeds "
      f"collect.total_steps={config.collect.total_steps}: lower it"
    )
  for path in ("steps_per_epoch", "total_steps", "first_epoch_min_steps", "first_epoch_max_steps"):
    steps = getattr(config.collect, path)
    if steps % config.env.num_envs:
      raise UserError(f"collect.{path}={steps} is not a multiple of env.num_envs={config.env.num_envs}: change one")
  frames = config.denoiser.conditioning_frames + config.actor_critic.horizon
  room = (config.replay.capacity + config.replay.final_frames) // config.env.num_envs
  if room < frames:
    raise UserError(
      f"replay.capacity={config.replay.capacity} leaves {room} frames a stream (env.num_envs={config.env.num_envs}), "
      f"less than one segment of {frames} (denoiser.conditioning_frames={config.denoiser.conditioning_frames} and "
      f"actor_critic.horizon={config.actor_critic.horizon}): raise it"
    )


def _check_names(variant: str, preset: str) -> None:
  for kind, name, known in (("variant", variant, VARIANTS), ("preset", preset, PRESETS)):
    if name not in known:
      raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}")


def split_override(text: str) -> tuple[str, str]:
  """Splits 'path=value'.

  Raises:
    UserError: if the text is not of that form.
  """
  path, separator, value = text.partition("=")
  if not separator or not path:
    raise UserError(f"override {text!r} is not of the form path=value, such as actor_critic.horizon=10")
  return path.strip(), value.strip()


def _replace(node: Any, tree: Mapping[str, Any]) -> Any:
  changes = {
    name: _replace(getattr(node, name), value) if isinstance(value, Mapping) else value for name, value in tree.items()
  }
  return dataclasses.replace(node, **changes)


def _convert(path: str, value: Any, kind: Any) -> Any:
  """Returns `value` as the field's type, parsing texts; refuses what would lose or invent information."""

  def wrong() -> UserError:
    name = f"a tuple of {kind.__args__[0].__name__}" if isinstance(kind, types.GenericAlias) else kind.__name__
    return UserError(f"{path}={value!r} is not {name}" + (" (true or false)" if kind is bool else ""))

  if isinstance(kind, types.GenericAlias):  # tuple[x, ...]
    if isinstance(value, str):
      inner = value.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
      value = [part.strip() for part in inner.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
      raise wrong()
    return tuple(_convert(path, part, kind.__args__[0]) for part in value)
  if kind is str:
    if not isinstance(value, str):
      raise wrong()
    return value
  if isinstance(value, str):
    text = value.strip()
    if kind is bool:
      if text.lower() not in ("true", "false"):
        raise wrong()
      return text.lower() == "true"
    try:
      value = float(text) if kind is float else int(text)
    except ValueError:
      raise wrong() from None
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      value = float(value)
    except OverflowError:
      raise wrong() from None
  if type(value) is not kind:
    raise wrong()
  return value


def _check_bounds(path: str, value: Any, metadata: Mapping[str, Any]) -> None:
  if isinstance(value, tuple) and len(value) > _MOST_ENTRIES:
    raise UserError(f"{path} has {len(value)} entries: at most {_MOST_ENTRIES}")
  for item in value if isinstance(value, tuple) else (value,):
    if isinstance(item, float) and math.isnan(item):
      raise UserError(f"{path} is not a number")
    if metadata["low"] is not None and item < metadata["low"]:
      raise UserError(f"{path}={value!r} is too small: at least {metadata['low']}")
    if metadata["above"] is not None and item < metadata["above"] + _LEAST:
      raise UserError(f"{path}={value!r} is too small: it must exceed {metadata['above']}")
    if metadata["high"] is not None and item > metadata["high"]:
      raise UserError(f"{path}={value!r} is too large: at most {metadata['high']}")
    if metadata["choices"] is not None and item not in metadata["choices"]:
      raise UserError(f"{path}={value!r} is not one of {', '.join(metadata['choices'])}")
    # Only the largest churned noise level may be infinite.
    if isinstance(item, float) and abs(item) > _LARGEST and path != "sampler.churn_max":
      raise UserError(f"{path} is infinite{'' if math.isinf(item) else ' in float32'}: give a finite number")
