"""Films the dreams of a trained model: the real game, the dream of the same actions, and the policy's own dream.

  python experiments/dream.py --workdir=runs/breakout --out=dream.gif
  python experiments/dream.py --workdir=jedi://catch

Every dream starts from real frames of new games, or of the held-out episodes of a run on recorded episodes; all later
frames are imagined. For a run without a probe decoder, a
probe is fitted to the recorded games; the run is not changed.
"""

import jax
import numpy as np
from absl import flags

import jedi_jax
from jedi_jax.inspection import film, probe, recording
from jedi_jax.runs import program, sharing, workdir
from jedi_jax.training import seeds

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, or a saved agent.")
_OUT = flags.DEFINE_string("out", "dream.gif", "File of the film: .gif, or .mp4 (needs ffmpeg).")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which checkpoint of the run.")
_DATA = flags.DEFINE_string("data", None, "Directory of the data set of a run on recorded episodes, if it has moved.")
_STEPS = flags.DEFINE_integer("steps", 1_000, "Environment steps to record.", lower_bound=1, upper_bound=10**6)
_LENGTH = flags.DEFINE_integer(
  "length", 0, "Steps of a dream; 0 for twice the training horizon.", lower_bound=0, upper_bound=10_000
)
_TAKES = flags.DEFINE_integer(
  "takes", 4, "Dreams in the film, spread evenly over the recording.", lower_bound=1, upper_bound=1_000
)
_PROBE_UPDATES = flags.DEFINE_integer(
  "probe_updates", 1_000, "Updates of the probe, if one is fitted.", lower_bound=1, upper_bound=10**6
)
_FPS = flags.DEFINE_float("fps", 8.0, "Environment steps per second of the film.", lower_bound=0.1, upper_bound=60.0)
_SIZE = flags.DEFINE_integer("size", 192, "Minimum height of a pane in pixels.", lower_bound=16, upper_bound=2048)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of games and dreams; independent of training seeds.", lower_bound=0, upper_bound=2**32 - 1
)


def main() -> None:
  """Records games, imagines, and writes the film."""
  if not _WORKDIR.value:
    raise jedi_jax.UserError("--workdir is missing: name the directory of a run")
  out = workdir.locate(_OUT.value)
  if out.suffix not in (".gif", ".mp4"):
    raise jedi_jax.UserError(f"--out={out} is neither .gif nor .mp4")
  program.enable_compilation_cache()
  run = workdir.read(sharing.resolve(_WORKDIR.value))
  agent = jedi_jax.load_agent(run.path, _CHECKPOINT.value)
  episodes = recording.real_episodes(
    run, agent, steps=_STEPS.value, num_envs=1, seed=seeds.evaluation_seed(_SEED.value), data=_DATA.value
  )
  if agent.model.decode is None:
    print(f"the run has no probe decoder: fitting one in {_PROBE_UPDATES.value:,} updates ...", flush=True)
    agent = probe.fit(agent, episodes, updates=_PROBE_UPDATES.value, seed=_SEED.value)
  length = _LENGTH.value or 2 * run.config.actor_critic.horizon
  windows = recording.windows(episodes, before=agent.model.conditioning_frames, after=length, stride=length)
  takes = np.unique(np.linspace(0, len(windows.mask) - 1, _TAKES.value).round().astype(int))
  shot = film.shoot(agent, jax.tree.map(lambda x: x[takes], windows), seed=_SEED.value)
  images = film.draw(shot, size=_SIZE.value)
  film.write(images, out, frames_per_second=_FPS.value)
  print(f"{len(takes)} dreams, {len(images)} frames, {out.stat().st_size / 1024:.0f} KiB: {out}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
