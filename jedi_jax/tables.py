"""Tables in Markdown."""

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
  """Formats rows as a Markdown table; the first row is the header."""
  lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
