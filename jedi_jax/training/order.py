"""Which phases run and train together, by `training.order`."""

from collections.abc import Iterable, Sequence

from jedi_jax.models.base import Phase

_WORLD_MODEL = ("denoiser", "reward_end")

Turns = tuple[tuple[Phase, ...], ...]
"""The updates of a group in turn, each as the phases whose losses it adds up."""


def group_phases(phases: Sequence[Phase], order: str) -> dict[str, Turns]:
  """Returns the phases that run together, by the name of their group, in order.

  Args:
    phases: of the model.
    order: 'sequential' runs every phase by itself; 'alternating' and 'joint' run denoiser and reward_end together, as
      group 'world_model', in turns or in one update.
  """
  together = tuple(phase for phase in phases if phase.name in _WORLD_MODEL)
  alone: dict[str, Turns] = {phase.name: ((phase,),) for phase in phases}
  if order == "sequential" or len(together) < 2:
    return alone
  turns = (together,) if order == "joint" else tuple((phase,) for phase in together)
  return {"world_model": turns, **{name: own for name, own in alone.items() if name not in _WORLD_MODEL}}


def owned_components(phases: Iterable[Phase]) -> dict[str, tuple[str, ...]]:
  """Returns by phase of one update the components that its optimiser moves: those that no earlier phase has."""
  owned: dict[str, tuple[str, ...]] = {}
  for phase in phases:
    taken = {name for names in owned.values() for name in names}
    owned[phase.name] = tuple(name for name in phase.components if name not in taken)
  return owned
