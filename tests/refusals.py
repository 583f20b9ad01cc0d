"""How the tests check a mistake of the user: a `UserError` of one line that names what it should."""

import pytest

from jedi_jax.errors import UserError


def refused(function, *parts):
  with pytest.raises(UserError) as caught:
    function()
  assert "\n" not in str(caught.value)
  for part in parts:
    assert part in str(caught.value)
