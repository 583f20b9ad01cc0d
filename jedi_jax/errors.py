"""What programs tell in a line: what a user can mend, a training that failed, a run that was told to stop."""

import difflib
from collections.abc import Iterable

_NEAR = 0.6  # A similarity (0 to 1) under which a suggestion would only puzzle the reader.
_SHOWN = 3
_LISTED = 5


class UserError(ValueError):
  """A mistake in what the user asked for, as opposed to a fault of the library.

  The message is one line that names the thing and the fix. Programs print it and exit with status 2; nobody needs the
  traceback.
  """


class TrainingError(RuntimeError):
  """Training that cannot go on, as opposed to a mistake of the user: its numbers are no longer finite.

  The message is one line that names the component. Programs print it and exit with status 3.
  """


class Interrupted(Exception):  # noqa: N818 - nothing went wrong.
  """A run that stopped because it was told to; run again, it continues.

  The message is one line. Programs print it and exit with status 75.
  """


def nearest(name: str, candidates: Iterable[str]) -> str:
  """Suggests what the user may have meant, as the tail of an error message.

  Names are compared without regard to case, whole and by their part after the last `/`, so that `Pong` finds
  `atari/Pong`.

  Args:
    name: what the user wrote.
    candidates: the names that are known.

  Returns:
    `; nearest: a, b` with at most three names, the likeliest first (only those that differ in case alone, where there
    are any); `; known: a, b, ... (N in all)` when nothing is near; the empty string without candidates.
  """
  known = list(candidates)
  if not known:
    return ""
  scores = {candidate: _similarity(name, candidate) for candidate in known}
  near = sorted((c for c in known if scores[c] >= _NEAR), key=lambda c: -scores[c])
  if near:
    best = scores[near[0]]
    shown = [c for c in near if scores[c] == 1.0] if best == 1.0 else near
    return "; nearest: " + ", ".join(shown[:_SHOWN])
  rest = f", ... ({len(known)} in all)" if len(known) > _LISTED else ""
  return "; known: " + ", ".join(known[:_LISTED]) + rest


def _similarity(name: str, candidate: str) -> float:
  """Similarity of two names in [0, 1]; 1 where they differ in case or prefix only."""
  left, right = name.casefold(), candidate.casefold()
  pairs = ((left, right), (left.rpartition("/")[2], right.rpartition("/")[2]))
  return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
