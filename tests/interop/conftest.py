import pytest
from torch_writer import Writer

from jedi_jax.interop import torch_file


@pytest.fixture
def pt(tmp_path_factory, monkeypatch):
  """Writes `.pt` files; they are read back by the reader that needs no torch."""
  monkeypatch.setattr(torch_file, "_torch_is_safe", lambda: False)
  return Writer(tmp_path_factory.mktemp("pt"), monkeypatch)
