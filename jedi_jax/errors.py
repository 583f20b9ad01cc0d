"""Exceptions that programs show to the user as a one-line message, and suggestions for misspelled names."""

import difflib
from collections.abc import Iterable

_NEAR = 0.6  # Smallest similarity, in [0, 1], of a suggestion.
_SHOWN = 3  # Largest number of suggestions.
_LISTED = 5  # Names listed if there is no suggestion.


class UserError(ValueError):
  """A mistake in the user's input, as opposed to a bug of the library.

  The message is one line that names the mistake and the fix. Programs print it without a traceback and exit with
  status 2.
  """


class TrainingError(RuntimeError):
  """Training cannot continue because its numbers are no longer finite.

  The message is one line that names the component. Programs print it and exit with status 3.
  """


class Interrupted(Exception):  # noqa: N818 - not an error.
  """A run stopped on request; the same command continues it.

  The message is one line. Programs print it and exit with status 75.
  """


class DisconnectedError(RuntimeError):
  """Another process of the run ended or cannot be reached; the same command in all processes continues the run.

  The message is one line. Programs print it and exit with status 76.
  """


def nearest(name: str, candidates: Iterable[str]) -> str:
  """Returns suggestions for a misspelled name, as the end of an error message.

  The comparison ignores case and also considers only the part after the last `/`, so that `Pong` finds `atari/Pong`.

  Args:
    name: the misspelled name.
    candidates: the known names.

  Returns:
    `; nearest: a, b` with at most three names, the most similar first (only those that differ in case alone, if there
    are any); `; known: a, b, ... (N in all)` if none is similar; the empty string without candidates.
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
  """Returns the similarity of two names in [0, 1]; 1 if they differ only in case or prefix."""
  left, right = name.casefold(), candidate.casefold()
  pairs = ((left, right), (left.rpartition("/")[2], right.rpartition("/")[2]))
  return max(difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
