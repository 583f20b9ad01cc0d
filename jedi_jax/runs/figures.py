"""Figures, where matplotlib is installed (pip install 'jedi_jax[plots]')."""

import pathlib
from typing import Any


def pyplot(path: pathlib.Path) -> Any:
  """Returns matplotlib's pyplot, drawing to files only; None, with a line that says so, where it is not installed.

  Args:
    path: of the figure that is about to be drawn.
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
  """Writes a figure to files of the formats that their endings name, closes it and says where it is."""
  from matplotlib import pyplot as plt

  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
  plt.close(figure)
  print(f"written to {' and '.join(map(str, paths))}")
