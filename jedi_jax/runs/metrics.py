"""Descriptions of all metrics in metrics.jsonl. `python -m jedi_jax.runs.metrics` prints docs/metrics.md."""

from jedi_jax.tables import markdown_table

PHASES = ("denoiser", "reward_end", "actor_critic", "probe")

SECTIONS = (
  (
    "Progress",
    "training/loop.py",
    "",
    {
      "epoch": ("-", "Epoch, from 1."),
      "updates/<phase>": ("updates", "Updates of the phase since the start of the run, skipped updates included."),
    },
  ),
  (
    "Environment",
    "training/run.py",
    "",
    {
      "env_steps": ("steps", "Environment steps since the start of the run, over all environments."),
      "frames": ("frames", "Emulator frames since the start of the run, skipped frames included."),
    },
  ),
  (
    "Collection",
    "training/run.py",
    "Absent in epochs without steps; return and length are absent without finished episodes.",
    {
      "collect/steps": ("steps", "Environment steps."),
      "collect/steps_per_second": ("1/s", "Environment steps per second of `time/collect_seconds`."),
      "collect/episodes": ("episodes", "Finished episodes. Episodes of Atari are whole games, with all their lives."),
      "collect/rewards_negative": ("steps", "Steps with a negative reward."),
      "collect/rewards_zero": ("steps", "Steps without a reward."),
      "collect/rewards_positive": ("steps", "Steps with a positive reward."),
      "collect/return": ("reward", "Mean return of the finished episodes, rewards not clipped."),
      "collect/length": ("steps", "Mean length of the finished episodes."),
    },
  ),
  (
    "Every phase",
    "training/updates.py",
    "The metrics of all phases are means over the epoch's updates that are not skipped.",
    {
      "<phase>/loss": ("-", "Loss: the sum of all `loss_` metrics of the phase."),
      "<phase>/grad_norm": (
        "-",
        "Global norm of the gradient before clipping. In a joint update that of the encoder is part of the phase whose "
        "optimiser moves it, and has both losses.",
      ),
      "<phase>/skipped": ("updates", "Updates in this epoch that are skipped: their loss or gradient is not finite."),
    },
  ),
  (
    "Denoiser",
    "models/dynamics.py",
    "",
    {
      "denoiser/loss_denoising_<i>": (
        "-",
        "Loss of target i, divided by the number of targets: the squared error of the network's output with "
        "diffusion, of the latents in units of `denoiser.sigma_data` with regression.",
      ),
      "denoiser/used_estimates": (
        "fraction",
        "Updates in which later targets are conditioned on estimates of earlier ones (see `denoiser.switching`).",
      ),
      "denoiser/change_square": (
        "latent²",
        "Mean square of the latent's change in a step; only with `denoiser.target` change.",
      ),
    },
  ),
  (
    "Scale of the latents",
    "runs/telemetry.py",
    "Of the frames in the denoiser's batches.",
    {
      "denoiser/latent_deviation": (
        "latent",
        "Deviation over time: the root of the mean over positions and channels of the variance over frames. A small "
        "one shows that the latents collapse to one picture.",
      ),
      "denoiser/latent_change": ("latent", "Root mean square change of the latent in one step."),
      "denoiser/latent_std": (
        "latent",
        "Standard deviation over positions and frames: the root of the channels' mean variance. A constant picture has "
        "one too.",
      ),
      "denoiser/latent_rank": (
        "-",
        "Effective rank of the channels' covariance, from 1 to the number of channels (Roy and Vetterli "
        "2007). A small one shows that the latents collapse.",
      ),
    },
  ),
  (
    "Movement of the encoder",
    "training/epoch.py",
    "Of fixed frames of replay, over the epoch's updates of all phases; absent without a learned encoder.",
    {
      "denoiser/encoder_movement": (
        "step changes",
        "Root mean square movement of the latents over a device call, divided by the root mean square change of the "
        "same latents in one step. The calls of an epoch add up to the length of a path. Above 1 the latents move "
        "faster than the game.",
      ),
    },
  ),
  (
    "Clamp",
    "ops/statistics.py",
    "",
    {
      "denoiser/latent_clamped": (
        "fraction",
        "Latent values beyond 0.9 times `encoder.clamp`; absent without a clamp.",
      ),
    },
  ),
  (
    "Reward / end model",
    "models/reward_end.py",
    "",
    {
      "reward_end/loss_reward": ("nats", "Cross-entropy of the reward's sign."),
      "reward_end/loss_end": ("nats", "Cross-entropy of the end of the episode."),
    },
  ),
  (
    "Rewards and ends, by class",
    "runs/telemetry.py",
    "A recall is absent without examples of its class, a precision without predictions of it.",
    {
      "reward_end/reward_count_<sign>": ("examples", "Transitions in this epoch's batches whose reward has the sign."),
      "reward_end/reward_recall_<sign>": ("fraction", "Transitions with the sign that are predicted to have it."),
      "reward_end/reward_precision_<sign>": ("fraction", "Transitions predicted to have the sign that have it."),
      "reward_end/end_count_<end>": ("examples", "Transitions in this epoch's batches with this end."),
      "reward_end/end_recall_<end>": ("fraction", "Transitions with this end that are predicted to have it."),
      "reward_end/end_precision_<end>": ("fraction", "Transitions predicted to have this end that have it."),
    },
  ),
  (
    "Replay",
    "models/phases.py",
    "To compare with `actor_critic/imagined_return` and `actor_critic/imagined_end_rate`.",
    {
      "reward_end/replay_return": ("reward signs", "Sum of the rewards' signs over H real steps of replay."),
      "reward_end/replay_end_rate": ("fraction", "Transitions in the batches that end an episode."),
    },
  ),
  (
    "Actor-critic",
    "models/actor_critic.py",
    "On imagined trajectories, up to their end.",
    {
      "actor_critic/loss_policy": ("-", "REINFORCE loss with the value as the baseline."),
      "actor_critic/loss_value": ("-", "Squared error of the value, times `actor_critic.value_weight`."),
      "actor_critic/loss_entropy": ("-", "Negative entropy of the policy, times `actor_critic.entropy_weight`."),
      "actor_critic/policy_entropy": ("nats", "Entropy of the policy."),
      "actor_critic/value_mean": ("reward signs", "Value, an estimate of the discounted return."),
      "actor_critic/lambda_return": ("reward signs", "Lambda-return, the target of the value."),
      "actor_critic/imagined_return": ("reward signs", "Undiscounted sum of the rewards' signs over the horizon."),
      "actor_critic/imagined_end_rate": ("fraction", "Imagined steps that end an episode."),
    },
  ),
  (
    "Reconstruction",
    "models/phases.py",
    "",
    {
      "denoiser/loss_reconstruction": (
        "pixel²",
        "Squared error of the decoded latents, pixels in [-1, 1]; only where a reconstruction trains the encoder.",
      ),
      "probe/loss_reconstruction": (
        "pixel²",
        "The same of the probe, on detached latents; only if the configuration has updates of the probe.",
      ),
    },
  ),
  (
    "Evaluation",
    "training/loop.py",
    "Every `evaluation.interval_epochs` epochs.",
    {
      "evaluation/return": ("reward", "Mean return of whole games, rewards not clipped."),
      "evaluation/length": ("steps", "Mean length of the games."),
    },
  ),
  (
    "World model",
    "runs/telemetry.py",
    "Every `evaluation.interval_epochs` epochs, on 64 segments of replay, imagined over H steps with the real actions.",
    {
      "world_model/f1_real": (
        "fraction",
        "Mean F1 score of negative rewards, positive rewards and ends on real latents, over the classes with at least "
        "5 examples; absent without such a class.",
      ),
      "world_model/f1_imagined": ("fraction", "The same on imagined latents."),
      "world_model/error_1": (
        "fraction",
        "Root mean square error of the latent after one imagined step, divided by that of copying the last real one.",
      ),
      "world_model/error_last": ("fraction", "The same after H steps."),
      "world_model/calibration": (
        "fraction",
        "Calibration of the sampler: variance of 4 samples of the next latent, times 1 + 1/4, over the squared error "
        "of their mean. It is about 1 for a calibrated sampler, and 0 for a deterministic one that errs.",
      ),
    },
  ),
  (
    "Time",
    "training/loop.py",
    "Packed runs share the times of updates and epochs.",
    {
      "time/collect_seconds": ("s", "Collection; with `collect.overlap` it runs beside the updates."),
      "time/update_seconds": ("s", "All updates."),
      "time/updates_per_second": ("1/s", "Updates of one run per second."),
      "time/<phase>_seconds": (
        "s",
        "Updates of the phase, or of `world_model` where `training.order` runs denoiser and reward_end together; every "
        "`training.time_phases_every` epochs.",
      ),
      "time/<phase>_updates_per_second": (
        "1/s",
        "Updates of the phase per second, of `world_model` those of the denoiser; as often.",
      ),
      "time/epoch_seconds": ("s", "Collection and updates."),
      "time/evaluation_seconds": ("s", "Evaluation of this epoch."),
      "time/total_seconds": ("s", "The run so far, resumed or not; without compilation and saving."),
    },
  ),
)
"""Sections of docs/metrics.md: title, module that computes the metrics, note, and key -> (unit, meaning)."""


def describe() -> str:
  """Lists all metrics in Markdown."""
  lines = [
    "# Metrics",
    "",
    "A run writes one record per epoch to metrics.jsonl, and the same numbers to TensorBoard, where the image",
    "`dreams/real_over_imagined` is added if frames can be decoded. NaN and infinity are `null` in metrics.jsonl.",
    f"`<phase>` is {', '.join(PHASES[:-1])} or {PHASES[-1]}; `<sign>` is -1, 0 or +1; `<end>` is no or yes.",
    "`python -m jedi_jax.runs.metrics` prints this page.",
  ]
  for title, module, note, metrics in SECTIONS:
    rows = [("key", "unit", "meaning"), *((f"`{key}`", unit, meaning) for key, (unit, meaning) in metrics.items())]
    lines += ["", f"## {title}", "", f"Computed in `jedi_jax/{module}`. {note}".strip(), "", markdown_table(rows)]
  return "\n".join(lines)


if __name__ == "__main__":
  print(describe())
