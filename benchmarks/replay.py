"""Times sampling from replay at several fill levels.

  python benchmarks/replay.py

The time of a batch should not depend on the number of stored frames. The result is written to
benchmarks/results/replay_<platform>.json.
"""

import functools

import jax
import numpy as np
import record
from absl import flags

from jedi_jax import replay
from jedi_jax.runs import program

_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "Segments in a batch.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 19, "Frames in a segment.", lower_bound=1)

SHAPE = (64, 64, 3)
SLOTS = 110_000
CHUNK = 1_000
EPISODE = 200


def main() -> None:
  """Runs the benchmark."""
  started = record.machine()
  state = replay.init(num_streams=1, slots_per_stream=SLOTS, observation_shape=SHAPE)
  add = jax.jit(replay.add, donate_argnums=0)
  draw = jax.jit(
    functools.partial(
      replay.sample, length=_LENGTH.value, age_weights=(0.1, 0.1, 0.1, 0.7), beyond_end=True, final_frames=False
    )
  )
  keys = jax.random.split(jax.random.key(0), _BATCH.value)
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 256, (1, CHUNK, *SHAPE)).astype(np.uint8)
  place = np.arange(CHUNK)[None] % EPISODE
  chunk = replay.Chunk(
    frames=frames,
    actions=np.zeros((1, CHUNK), np.int32),
    rewards=np.zeros((1, CHUNK), np.float32),
    ends=place == EPISODE - 2,
    first=place == 0,
    final=place == EPISODE - 1,
    count=np.asarray([CHUNK], np.int32),
  )
  rows = []
  for stored in range(CHUNK, 100_000 + CHUNK, CHUNK):
    state = add(state, chunk)
    if stored in (1_000, 10_000, 100_000):
      times = record.seconds(functools.partial(draw, state, keys), repeats=_REPEATS.value, warmup=3)
      rows.append({"frames stored": stored, "batch": f"{_BATCH.value} x {_LENGTH.value}", "sample": times})
  print(record.table(rows, ["frames stored", "batch", "sample"]))
  print(f"written to {record.write(f'replay_{jax.default_backend()}', rows, started=started)}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
