"""The notebook runs."""

import json
import pathlib

import pytest

TOUR = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


def test_the_tour_has_no_outputs():
  cells = [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]
  assert cells
  assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.slow
def test_the_tour_runs(tmp_path, monkeypatch):
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  monkeypatch.setenv("PYTHONPATH", str(TOUR.parents[1]))
  resources = {"metadata": {"path": str(tmp_path)}}
  tour = nbformat.read(TOUR, as_version=4)
  nbclient.NotebookClient(tour, timeout=1_200, kernel_name="python3", resources=resources).execute()
  pictures = [o for cell in tour.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
  assert len(pictures) == 3
