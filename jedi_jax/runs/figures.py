"""Figures, drawn if matplotlib is installed (pip install 'jedi_jax[plots]')."""

import pathlib
from typing import Any


def pyplot(path: pathlib.Path) -> Any:
  """Returns matplotlib's pyplot with a backend that draws to files, or prints a line and returns None without it.

  Args:
    path: the figure to draw, for the printed line.
  """
  try:
    import matplotlib as mpl
  except ImportError:
    print(f"{path.name} is not drawn: matplotlib is missing (pip install 'jedi_jax[plots]')")
    return None
  mpl.use("Agg")
  from matplotlib import pyplot as plt

  return plt


def save(figure: Any, *paths: pathlib.Path) -> None:
  """Writes a figure to files, in the formats of their suffixes, closes it and prints the paths."""
  from matplotlib import pyplot as plt

  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
  plt.close(figure)
  print(f"written to {' and '.join(map(str, paths))}")
