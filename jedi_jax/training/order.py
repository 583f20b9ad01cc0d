"""Which phases run and train together, by `training.order`."""

from collections.abc import Iterable, Sequence

from jedi_jax.models.base import Phase

_WORLD_MODEL = ("denoiser", "reward_end")


def group_phases(names: Sequence[str], order: str) -> dict[str, tuple[str, ...]]:
  """Returns the names of the phases that run together, by the name of their group, in order.

  Args:
    names: of the phases.
    order: 'sequential' runs every phase by itself; 'alternating' and 'joint' run denoiser and reward_end together, as
      group 'world_model'.
  """
  together = tuple(name for name in names if name in _WORLD_MODEL)
  if order == "sequential" or len(together) < 2:
    return {name: (name,) for name in names}
  return {"world_model": together, **{name: (name,) for name in names if name not in together}}


def group_updates(phases: Sequence[Phase], order: str) -> list[tuple[Phase, ...]]:
  """Returns the phases whose losses one update adds up: those of a group with order 'joint', else each by itself."""
  by_name = {phase.name: phase for phase in phases}
  groups = group_phases(list(by_name), order if order == "joint" else "sequential")
  return [tuple(by_name[name] for name in names) for names in groups.values()]


def owned_components(phases: Iterable[Phase]) -> dict[str, tuple[str, ...]]:
  """Returns by phase of one update the components that its optimiser moves: those that no earlier phase has."""
  owned: dict[str, tuple[str, ...]] = {}
  for phase in phases:
    taken = {name for names in owned.values() for name in names}
    owned[phase.name] = tuple(name for name in phase.components if name not in taken)
  return owned
