"""Serves a page on this machine to play in the dream of a trained model, beside the real game.

  python experiments/play.py
  python experiments/play.py --workdir=runs/breakout

Without a run, the dream is that of the agent of Catch that is part of the package. Open the printed address in a
browser. A dream starts from frames of the real game; all later frames are imagined for the actions of your keyboard, or
of the policy. For a run without a probe decoder, a probe is fitted to recorded games; the run is not changed. Needs
`pip install '.[play]'`.
"""

import secrets

from absl import flags

import jedi_jax
from jedi_jax.inspection import probe, recording
from jedi_jax.play import server
from jedi_jax.play.session import SPEEDS, Session
from jedi_jax.runs import program, sharing, workdir
from jedi_jax.training import seeds

_WORKDIR = flags.DEFINE_string("workdir", "jedi://catch", "Directory of the run, or a saved agent.")
_CHECKPOINT = flags.DEFINE_enum("checkpoint", "latest", ["latest", "best"], "Which checkpoint of the run.")
_DATA = flags.DEFINE_string("data", None, "Directory of the data set of a run on recorded episodes, if it has moved.")
_PORT = flags.DEFINE_integer("port", 8000, "Port on 127.0.0.1; 0 for a free one.", lower_bound=0, upper_bound=65535)
_SPEED = flags.DEFINE_float(
  "speed",
  None,
  "Steps a second; by default 15 for Atari and 5 elsewhere.",
  lower_bound=SPEEDS[0],
  upper_bound=SPEEDS[1],
)
_PROBE_UPDATES = flags.DEFINE_integer(
  "probe_updates", 1_000, "Updates of the probe, if one is fitted.", lower_bound=1, upper_bound=10**6
)
_PROBE_STEPS = flags.DEFINE_integer(
  "probe_steps", 1_000, "Environment steps to record for the probe.", lower_bound=1, upper_bound=10**6
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of games and dreams; independent of training seeds.", lower_bound=0, upper_bound=2**32 - 1
)


def main() -> None:
  """Loads the run and serves the page until Ctrl-C."""
  server.check_installed()
  program.enable_compilation_cache()
  place = sharing.resolve(_WORKDIR.value)
  run = workdir.read(place)  # Before the port is taken.
  with server.listen(_PORT.value) as listener:
    agent = jedi_jax.load_agent(place, _CHECKPOINT.value)
    seed = seeds.evaluation_seed(_SEED.value)
    recorded = run.data is not None  # There is no game to play: dreams start from episodes that are held out.
    if recorded or _DATA.value or agent.model.decode is None:
      episodes = recording.real_episodes(run, agent, steps=_PROBE_STEPS.value, num_envs=1, seed=seed, data=_DATA.value)
    if agent.model.decode is None:
      print(f"the run has no probe decoder: fitting one in {_PROBE_UPDATES.value:,} updates ...", flush=True)
      agent = probe.fit(agent, episodes, updates=_PROBE_UPDATES.value, seed=_SEED.value)
    before = agent.model.conditioning_frames
    starts = recording.windows(episodes, before=before, after=0, stride=before) if recorded else None
    print("compiling the dream ...", flush=True)
    session = Session(agent, seed=seed, speed=_SPEED.value, starts=starts)
    token = secrets.token_urlsafe()
    print(f"play at {server.address(listener, token)} (Ctrl-C stops)", flush=True)
    server.serve(session, listener, token)


if __name__ == "__main__":
  program.run(main, __doc__ or "")
