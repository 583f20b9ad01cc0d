"""Times a step of the play page: dream, real game, and the picture that is sent to the browser.

  python benchmarks/play.py --agents=jedi://catch,jedi://breakout,runs/breakout

The page shows so many frames a second at most; in a browser its `rate` adds the way there. The policy plays. A run
without a probe decoder gets an untrained one, which is as fast as a trained one. The result is written to
benchmarks/results/play_<platform>.json.
"""

import functools

import jax
import numpy as np
import record
from absl import flags

import jedi_jax
from jedi_jax.inspection import probe, recording
from jedi_jax.play.session import Session
from jedi_jax.runs import program

_AGENTS = flags.DEFINE_list("agents", ["jedi://catch"], "Runs or saved agents.")
_STEPS = flags.DEFINE_integer("steps", 200, "Timed steps.", lower_bound=10)


def main() -> None:
  """Runs the benchmark."""
  started, rows = record.machine(), []
  for name in _AGENTS.value:
    agent = jedi_jax.load_agent(name)
    assert agent.config is not None
    if agent.model.decode is None:
      agent = probe.fit(agent, recording.record(agent, steps=200, num_envs=1, seed=0), updates=1, seed=0)
    session = Session(agent, seed=0)
    session.handle('{"do": "set", "policy": true}')
    times = record.seconds(functools.partial(_step, session), repeats=_STEPS.value, warmup=20)
    session.close()
    about = {"agent": name, "env": agent.config.env.name, "preset": agent.config.preset}
    rows.append({**about, "step": times, "frames/s, median": 1 / np.median(times)})
  print(record.table(rows, ["agent", "env", "preset", "step", "frames/s, median"]))
  print(f"written to {record.write(f'play_{jax.default_backend()}', rows, started=started)}")


def _step(session: Session) -> None:
  session.step(session.choose())
  session.picture()


if __name__ == "__main__":
  program.run(main, __doc__ or "")
