"""Writes a data set of recorded episodes from a run's replay, from DIAMOND's episodes or from a data set of Minari.

  python experiments/make_dataset.py --workdir=runs/breakout --out=data/breakout
  python experiments/make_dataset.py --diamond=dataset/train --num_actions=4 --out=data/breakout
  python experiments/make_dataset.py --minari=atari/breakout/expert-v0 --out=data/breakout

docs/data.md describes the format. Nothing in the files that are read is executed.
"""

from absl import flags

import jedi_jax
from jedi_jax import datasets
from jedi_jax.interop import episodes as interop
from jedi_jax.runs import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run, whose replay is exported.")
_DIAMOND = flags.DEFINE_string("diamond", None, "DIAMOND's folder of episodes, such as dataset/train.")
_MINARI = flags.DEFINE_string("minari", None, "Name of a data set of Minari.")
_DOWNLOAD = flags.DEFINE_bool("download", False, "Downloads the data set of Minari if it is not here.")
_KEY = flags.DEFINE_string("key", "", "Key of the images where Minari's observations are dictionaries.")
_NUM_ACTIONS = flags.DEFINE_integer(
  "num_actions", None, "Number of actions, which DIAMOND's files do not hold.", lower_bound=1, upper_bound=10**6
)
_OUT = flags.DEFINE_string("out", None, "Directory of the data set; new or empty.")


def main() -> None:
  """Writes the data set of the flags."""
  given = {"--workdir": _WORKDIR.value, "--diamond": _DIAMOND.value, "--minari": _MINARI.value}
  if sum(bool(value) for value in given.values()) != 1:
    raise jedi_jax.UserError(f"give exactly one of {', '.join(given)}")
  if not _OUT.value:
    raise jedi_jax.UserError("--out is missing: name a directory for the data set")
  if bool(_DIAMOND.value) != (_NUM_ACTIONS.value is not None):
    raise jedi_jax.UserError("--num_actions goes with --diamond, whose files do not hold it")
  if (_KEY.value or _DOWNLOAD.value) and not _MINARI.value:
    raise jedi_jax.UserError("--key and --download go with --minari")
  if _WORKDIR.value:
    run, episodes = datasets.from_run(_WORKDIR.value)
    source = run.config.env.name if run.data is None else run.data.get("source", "")
    written = datasets.write(_OUT.value, episodes, num_actions=run.spec.num_actions, source=source)
  elif _DIAMOND.value:
    episodes = interop.read_diamond(_DIAMOND.value)
    written = datasets.write(_OUT.value, episodes, num_actions=_NUM_ACTIONS.value, source="DIAMOND")
  else:
    dataset = interop.load_minari(_MINARI.value, download=_DOWNLOAD.value)
    episodes, actions = interop.read_minari(dataset, key=_KEY.value), interop.minari_actions(dataset)
    written = datasets.write(_OUT.value, episodes, num_actions=actions, source=_MINARI.value)
  print(f"{written[0]:,} episodes of {written[1]:,} steps: {_OUT.value}")


if __name__ == "__main__":
  program.run(main, __doc__ or "")
