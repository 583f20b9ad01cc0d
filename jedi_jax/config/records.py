"""The records of settings and their defaults: preset `paper` with variant `jedi`. See `fields.TAGS` for the tags."""

import dataclasses
import math

from jedi_jax.config.checks import validate
from jedi_jax.config.fields import setting

_MAX_WIDTH = 2**16
"""Bound of channels and widths: more than any device can hold, and far below the sizes that overflow."""


@dataclasses.dataclass(frozen=True)
class EnvConfig:
  """The environment."""

  name: str = setting("atari/Breakout", "O")
  """'atari/<Game>' for any Atari game of EnvPool, 'gym/<id>', another family, 'catch', or a registered environment;
  'data' for recorded episodes."""
  num_envs: int = setting(1, "D", low=1, high=1024)
  """Environments that collect, each with its own stream of replay."""
  action_slots: int = setting(0, "O", low=0, high=1_000)
  """Number of actions of the networks, so that games with fewer can share a program; 0 for the game's own."""
  life_loss_ends: bool = setting(True, "D")
  """Whether losing a life ends a training episode; the game continues."""
  max_episode_steps: int = setting(27_000, "C", low=1, high=10**9)
  """Time limit of a game in agent steps (108,000 frames)."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """The encoder from pixels to latents."""

  kind: str = setting("learned", "C", choices=("learned", "identity"))
  """A convolutional network, or none: the latents are the frames (then leave `learns_from` empty)."""
  learns_from: tuple[str, ...] = setting(
    ("prediction", "reward_end"), "R", choices=("prediction", "reward_end", "reconstruction")
  )
  """Losses that train the encoder: the dynamics' loss through its conditioning, the reward / end loss, and the error of
  a decoder, which exists only with 'reconstruction'."""
  channels: tuple[int, ...] = setting((32, 32, 32, 16), "R", low=1, high=_MAX_WIDTH)
  """Channels of the stages; the last are the latent's."""
  downsample: tuple[bool, ...] = setting((True, True, True, False), "R")
  """Whether a stage ends in 2 x 2 max pooling."""
  patch: int = setting(1, "O", low=1, high=64)
  """Side of the squares of pixels that are stacked on the channels before the first stage; 1 for none."""
  clamp: float = setting(3.0, "R", low=0)
  """Scale s of the soft clamp s tanh(z / s) on latents; 0 for none."""
  norm: str = setting("running", "O", choices=("none", "frame", "running"))
  """Normalisation before the clamp, inside the gradient: of each frame over its positions and channels, or over time by
  a running mean of each position and channel and a running deviation of all. Latents without it have no fixed scale."""
  target_decay: float = setting(0.0, "R", low=0, high=1)
  """Decay per update of the moving average of the encoder that encodes the targets; 0 for none."""
  learning_rate_factor: float = setting(0.3, "R", low=0)
  """Ratio of the encoder's learning rate to that of the component it is trained with; in joint updates to that of the
  denoiser if the denoiser's loss or a reconstruction trains the encoder, else of the reward / end model."""
  chunk: int = setting(-1, "O", low=-1, high=10**6)
  """Frames encoded at a time; their activations are recomputed for the gradient, which takes less memory and more
  operations. 0 for all frames at once. -1 chooses: 0 on GPUs that give JAX at least 8 GiB (48 GiB for packed runs),
  where launches cost most; 208 on other GPUs; 64 elsewhere."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with clipping by global norm and a linear warm-up from 0."""

  learning_rate: float = setting(1e-4, "D", above=0)
  """Step size after the warm-up."""
  beta2: float = setting(0.999, "D", low=0, high=0.999_999)
  """Adam's decay of the second moments. With a lower one a sudden large gradient makes no step larger than usual."""
  epsilon: float = setting(1e-8, "D", above=0)
  """Adam's epsilon, outside the root."""
  weight_decay: float = setting(1e-2, "D", low=0)
  """Decoupled decay on kernels (not on biases, gains and embeddings)."""
  max_grad_norm: float = setting(100.0, "D", above=0)
  """Bound of the global norm of the gradient."""
  warmup_updates: int = setting(100, "D", low=0, high=10**9)
  """Updates of the linear warm-up; the first one has step size 0."""


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
  """The denoiser: inner network, noise levels and training targets."""

  kind: str = setting("diffusion", "C", choices=("diffusion", "regression"))
  """How the next latent is predicted: sampled by EDM diffusion, or regressed in one step with a squared error."""
  channels: tuple[int, ...] = setting((160,), "R", low=1, high=_MAX_WIDTH)
  """Channels of the U-Net's levels."""
  depths: tuple[int, ...] = setting((1,), "R", low=1, high=64)
  """Residual blocks on each side of each level."""
  attention: tuple[bool, ...] = setting((False,), "D")
  """Self-attention on each level (the middle always has it)."""
  conditioning_width: int = setting(256, "D", low=2, high=_MAX_WIDTH)
  """Width of the embedding of noise level and past actions."""
  conditioning_frames: int = setting(4, "C", low=1, high=256)
  """Past frames L that a prediction is conditioned on."""
  targets: int = setting(2, "D", low=1, high=64)
  """Successive targets in a training segment of L + targets frames."""
  final_frames: bool = setting(True, "O")
  """Whether the true final frame of an episode is also a target; it is not in DIAMOND."""
  switching: str = setting("random", "R", choices=("random", "alternate", "always_encoder", "always_denoiser"))
  """What later targets are conditioned on: the denoiser's estimates or the encoder's latents, by a fair coin per batch,
  in alternating batches, or always the same one."""
  clamp_estimate: bool = setting(True, "R")
  """Whether the encoder's soft clamp also applies to the denoiser's estimate (the loss is taken after it)."""
  target: str = setting("latent", "O", choices=("latent", "change"))
  """What is diffused: the next latent, or its change from the last one in units of the measured size of changes (then
  leave `clamp_estimate` off)."""
  average_decay: float = setting(0.0, "O", low=0, high=0.999_999)
  """Decay an update of the average of the denoiser's weights that imagination uses; 0 to use the weights themselves."""
  sigma_data: float = setting(1.0, "O", above=0)
  """Standard deviation of the data assumed by the preconditioning: 1 for normalised latents, 0.5 for DIAMOND's pixels.
  The noise levels of training and sampling are DIAMOND's in units of it."""
  offset_noise: float = setting(0.6, "O", low=0)
  """Standard deviation of noise shared by a channel's positions (DIAMOND: 0.3)."""
  sigma_log_mean: float = setting(0.293, "O")
  """Mean of ln sigma in training (DIAMOND: -0.4)."""
  sigma_log_std: float = setting(1.2, "D", low=0)
  """Standard deviation of ln sigma in training."""
  sigma_min: float = setting(4e-3, "O", above=0)
  """Smallest noise level in training (DIAMOND: 0.002)."""
  sigma_max: float = setting(40.0, "O", above=0, high=1e6)
  """Largest noise level in training (DIAMOND: 20)."""
  optimizer: OptimizerConfig = OptimizerConfig(max_grad_norm=1.0)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """The sampler of the reverse process (Karras et al. 2022, arXiv:2206.00364)."""

  num_steps: int = setting(3, "R", low=1, high=1_000)
  """Denoising steps per frame."""
  sigma_min: float = setting(4e-3, "O", above=0)
  """Last positive noise level (DIAMOND: 0.002)."""
  sigma_max: float = setting(10.0, "O", above=0, high=1e6)
  """First noise level (DIAMOND: 5)."""
  start: str = setting("sigma_max", "O", choices=("unit", "sigma_max"))
  """Standard deviation of the noise that sampling starts from: 1 as in DIAMOND, or the first noise level."""
  rho: float = setting(7.0, "D", low=0.1, high=1e3)
  """Curvature of the schedule."""
  order: int = setting(1, "D", low=1, high=2)
  """1 for Euler's method, 2 for Heun's."""
  churn: float = setting(0.0, "R", low=0)
  """Amount of noise added back; 1 in the paper's stochastic-Atari experiment."""
  churn_min: float = setting(0.0, "D", low=0)
  """Smallest noise level at which churn acts."""
  churn_max: float = setting(math.inf, "D", low=0, finite=False)
  """Largest noise level at which churn acts."""
  churn_noise: float = setting(1.0, "D", low=0)
  """Standard deviation of the noise that churn adds."""


@dataclasses.dataclass(frozen=True)
class RewardEndConfig:
  """The model of reward and end."""

  channels: tuple[int, ...] = setting((32, 32, 32, 32), "R", low=1, high=_MAX_WIDTH)
  """Channels of the levels of residual blocks."""
  depths: tuple[int, ...] = setting((2, 2, 2, 2), "R", low=1, high=64)
  """Residual blocks on each level."""
  attention: tuple[bool, ...] = setting((False,) * 4, "D")
  """Self-attention on each level (the last pair always has it)."""
  downsample: bool = setting(False, "R")
  """Whether levels halve the resolution; off for 8 x 8 latents."""
  conditioning_width: int = setting(128, "D", low=1, high=_MAX_WIDTH)
  """Width of the action embedding."""
  lstm_width: int = setting(512, "D", low=1, high=_MAX_WIDTH)
  """Width of the LSTM and of the head."""
  noise: float = setting(0.0, "O", low=0)
  """Standard deviation of the noise on the latents of half of the training segments, drawn by a coin, so that the model
  tolerates errors of imagined latents."""
  optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ActorCriticConfig:
  """The policy and value, and how they learn in imagination."""

  channels: tuple[int, ...] = setting((), "O", low=1, high=_MAX_WIDTH)
  """Channels of convolution stages before the LSTM; none on latents."""
  downsample: tuple[bool, ...] = setting((), "O")
  """Whether a stage ends in 2 x 2 max pooling."""
  lstm_width: int = setting(512, "O", low=1, high=_MAX_WIDTH)
  """Width of the LSTM."""
  input_norm: str = setting("none", "O", choices=("none", "frame"))
  """Normalisation of the latents that the policy and the value read, of each frame over its positions and channels."""
  forget_padding: bool = setting(True, "O")
  """Whether padding in the burn-in leaves the LSTM's state empty, as at the start of real episodes; not in DIAMOND."""
  restart_after_end: bool = setting(False, "O")
  """Whether a trajectory continues from other frames of replay after its first imagined end; otherwise it stops."""
  batch_size: int = setting(0, "R", low=0, high=10**6)
  """Imagined trajectories per update, over all devices; 0 for `training.batch_size`."""
  horizon: int = setting(15, "R", low=1, high=10_000)
  """Imagined steps H."""
  unroll: int = setting(1, "O", low=1, high=1_000)
  """Imagined steps per iteration of the compiled loop; more take longer to compile and launch fewer kernels."""
  gamma: float = setting(0.985, "R", low=0, high=1)
  """Discount."""
  lambda_: float = setting(0.95, "R", low=0, high=1)
  """Mixing parameter of the lambda-returns."""
  entropy_weight: float = setting(0.001, "R", low=0)
  """Weight of the entropy bonus, in nats."""
  value_weight: float = setting(1.0, "R", low=0)
  """Weight of the squared error of the value."""
  optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """A decoder trained on detached latents, to show imagined frames.

  It does not affect the agent. Models that can show their latents without it have none.
  """

  strips: int = setting(4, "O", low=0, high=64)
  """Segments shown in TensorBoard at every evaluation, imagined frames below the real ones."""
  optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)


@dataclasses.dataclass(frozen=True)
class CollectConfig:
  """Collection from the real environment; a step is one agent step (4 frames of Atari)."""

  total_steps: int = setting(100_000, "C", low=1, high=10**9)
  """Total environment steps (400,000 frames of Atari)."""
  steps_per_epoch: int = setting(100, "D", low=1, high=10**9)
  """Environment steps per epoch, over all environments."""
  first_epoch_min_steps: int = setting(5_000, "D", low=1, high=10**9)
  """Minimum of environment steps before the first update."""
  first_epoch_max_steps: int = setting(10_000, "D", low=1, high=10**9)
  """Maximum of environment steps before the first update."""
  first_epoch_rewards: int = setting(10, "D", low=0, high=10**9)
  """Rewards of the two rarer of the signs -1, 0 and 1, in total, after which the first collection ends."""
  epsilon: float = setting(0.01, "D", low=0, high=1)
  """Probability that a uniformly random action is drawn, after `epsilon_steps`."""
  first_epsilon: float = setting(0.01, "O", low=0, high=1)
  """Probability that a uniformly random action is drawn, at the first step."""
  epsilon_steps: int = setting(0, "O", low=0, high=10**9)
  """Environment steps over which the probability falls in a line from `first_epsilon` to `epsilon`; 0 for none."""
  epsilon_hold: int = setting(1, "O", low=1, high=1_000)
  """Longest hold of a random action, in steps. An action is held for n steps with a probability in proportion to
  1 / n**2 (arXiv:2006.01782), or until the next random action, and over the ends of games. More actions are then
  random at the same epsilon."""
  overlap: bool = setting(False, "O")
  """Whether the host collects an epoch's steps while the device trains on the earlier ones. New steps then reach replay
  one epoch later (with `training.final_epochs` 0, the last ones after the last update)."""


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
  """The ring buffer of frames on the device."""

  capacity: int = setting(100_000, "D", low=2, high=10**8)
  """Frames kept, over all environments; at least 128 for each, with `final_frames`."""
  final_frames: int = setting(10_000, "O", low=0, high=10**8)
  """Additional room for the true final frames of episodes."""
  age_weights: tuple[float, ...] = setting((0.1, 0.1, 0.1, 0.7), "D", low=0)
  """Probability of each group of episodes, oldest first; they sum to 1."""
  age_groups: str = setting("episodes", "D", choices=("episodes", "steps"))
  """Whether the groups have equal numbers of episodes, or of steps."""


@dataclasses.dataclass(frozen=True)
class Updates:
  """A number of updates of each component."""

  denoiser: int = setting(400, "D", low=0, high=10**9)
  """Updates of the denoiser."""
  reward_end: int = setting(400, "D", low=0, high=10**9)
  """Updates of the reward / end model."""
  actor_critic: int = setting(400, "D", low=0, high=10**9)
  """Updates of the actor-critic."""
  probe: int = setting(0, "O", low=0, high=10**9)
  """Updates of the probe decoder; there is no probe if `updates` and `first_updates` are both 0."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The training loop."""

  order: str = setting("sequential", "R", choices=("sequential", "alternating", "joint"))
  """How the denoiser and the reward / end model share an epoch. `sequential`: one after the other. `alternating`: in
  turns; the one with more updates has several in each turn. `joint`: one update on the sum of their losses. The
  actor-critic follows."""
  batch_size: int = setting(32, "R", low=1, high=10**6)
  """Segments or imagined trajectories per update, over all devices (the paper: 32 or 64). The actor-critic may have a
  number of its own, `actor_critic.batch_size`."""
  updates: Updates = Updates()
  first_updates: Updates = Updates(denoiser=10_000, reward_end=10_000, actor_critic=5_000)
  final_epochs: int = setting(50, "D", low=0, high=10**9)
  """Epochs after the last collection."""
  updates_per_call: int = setting(1_200, "O", low=1, high=10**9)
  """Maximum of updates per device call; a longer epoch takes several calls."""
  time_phases_every: int = setting(10, "O", low=1, high=10**9)
  """Interval in epochs at which each phase is a separate call, to measure its time."""
  max_skipped: int = setting(20, "O", low=0, high=10**9)
  """Consecutive updates of a phase that may be skipped because a loss or gradient is not finite."""
  collapse_std: float = setting(0.05, "O", low=0)
  """Deviation of the latents over time below which a warning reports their collapse."""
  collapse_rank: float = setting(1.5, "O", low=0)
  """Effective rank of the latents below which a warning reports their collapse."""
  runaway_movement: float = setting(1.0, "O", low=0)
  """Movement of the encoder in an epoch, in changes of one step, above which a warning is printed; 0 for none."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """Evaluation on whole games: no life-loss ends, epsilon 0, sampled actions."""

  episodes: int = setting(100, "C", low=1, high=10**6)
  """Games of the final evaluation."""
  interval_epochs: int = setting(100, "O", low=0, high=10**9)
  """Epochs between evaluations during training; 0 for none."""
  interval_episodes: int = setting(10, "O", low=1, high=10**6)
  """Games per evaluation during training."""
  num_envs: int = setting(10, "O", low=1, high=1024)
  """Environments that evaluate, each a fixed number of games."""
  max_episode_steps: int = setting(27_000, "C", low=1, high=10**9)
  """Time limit of a game in agent steps."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints of the whole training state."""

  interval_epochs: int = setting(25, "O", low=1, high=10**9)
  """Epochs between checkpoints; one is always written at the end."""
  keep: int = setting(2, "O", low=1, high=10**9)
  """Number of newest checkpoints that are kept."""


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
  """Number formats and kernels."""

  compute_dtype: str = setting("float32", "O", choices=("float32", "bfloat16"))
  """Format of activations and products; parameters, losses and group-norm statistics stay float32."""
  convolution: str = setting("auto", "O", choices=("auto", "lax", "matmul_gradient", "matmul", "pallas"))
  """Lowering of 3 x 3 convolutions. With 'pallas', imagination has kernels of a convolution and what follows it, and
  one of all residual blocks of a small reward / end model; elsewhere it is 'lax'. 'auto' is 'pallas' on GPUs with such
  kernels in bfloat16, 'matmul_gradient' on CPUs, and else 'lax'. What such kernels do not convolve, packed runs
  convolve run by run in large batches, and as 'matmul' in small ones."""
  kernels: str = setting("auto", "O", choices=("auto", "xla", "pallas"))
  """Kernels of group norm and attention: XLA's, or one each of Pallas, for GPUs; 'auto' uses 'pallas' on CUDA GPUs of
  compute capability 8.0 (Ampere) or newer. With 'pallas' the steps of LSTMs are also grouped as suits a GPU."""


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run except its directory. Every instance is valid.

  Raises:
    UserError: a setting has the wrong type or a value out of its range, or settings contradict one another.
  """

  variant: str = setting("jedi", "O")
  """Name of the variant that the settings were derived from, for records."""
  preset: str = setting("paper", "O")
  """Name of the preset that the settings were derived from, for records."""
  seed: int = setting(0, "O", low=0, high=2**31 - 1)
  """Seed of parameters, environments, exploration and batches."""
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
