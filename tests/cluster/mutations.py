"""Mutations that keep most of a file valid; `pick` is a `random.Random`."""

import contextlib
import io
import json
import math
import struct
import warnings
import zipfile

ODD = (
  None, True, False, -1, 0, 1, 2, 3, 7, 64, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e308,
  math.nan, math.inf, -math.inf, "", "x", "0", "nan", "a\nb", "\x00", "\ud800", "\x1b[2J", "../..", "x" * 5000,
  "9" * 5000, [], {}, [[]], [None], [0], [1, 2, 3], [-1, 1, 1], {"x": None}, [10**400], [math.nan], "catch", "jedi",
  "float32", "F32",
)  # fmt: skip
"""Values that readers of JSON meet where they expect others."""
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1)


def mutate_bytes(pick, data):
  """Flips, replaces, inserts, repeats and removes bytes."""
  data = bytearray(data)
  for _ in range(pick.choice((1, 1, 2, 4))):
    at = pick.randrange(len(data) + 1)
    size = min(pick.choice((1, 2, 4, 8, 64)), len(data) - at)
    kind = pick.randrange(8)
    if kind == 0 and at < len(data):
      data[at] ^= 1 << pick.randrange(8)
    elif kind == 1:
      data[at : at + size] = pick.randbytes(size)
    elif kind == 2:
      data[at : at + 8] = struct.pack("<Q", pick.choice(INTERESTING))[: pick.choice((1, 2, 4, 8))]
    elif kind == 3:
      del data[at : at + size]
    elif kind == 4:
      data[at:at] = pick.randbytes(pick.choice((1, 4, 64)))
    elif kind == 5:
      other = pick.randrange(len(data) + 1)
      data[at:at] = data[other : other + 64]
    elif kind == 6 and pick.random() < 0.3:
      del data[at:]
    else:
      data[at : at + 1] = pick.choice((b"0", b"-", b'"', b"[", b"{", b"}", b",", b"\n", b"\xff", b"e999", b"\x00"))
  return bytes(data)


def mutate_tree(pick, tree):
  """Replaces, removes, renames or repeats a value somewhere in a tree of JSON; returns the tree."""
  places = []

  def walk(node):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      places.append((node, key))
      if isinstance(value, dict | list):
        walk(value)

  walk([tree] if not isinstance(tree, dict | list) else tree)
  if not places or pick.random() < 0.02:
    return pick.choice(ODD)
  for _ in range(pick.choice((1, 1, 1, 2, 3))):
    node, key = pick.choice(places)
    if (isinstance(node, list) and key >= len(node)) or (isinstance(node, dict) and key not in node):
      continue
    kind, value = pick.randrange(10), node[key]
    if kind == 0:
      del node[key]
    elif kind == 1 and isinstance(node, dict):
      node[pick.choice(("x", "", key + " ", key.upper(), "x" * 300))] = node.pop(key)
    elif kind == 2 and isinstance(value, list):
      node[key] = value * pick.choice((2, 40))
    elif kind == 3:
      node[key] = [value]
    elif kind == 4:
      other, there = pick.choice(places)
      with contextlib.suppress(KeyError, IndexError):
        node[key] = json.loads(json.dumps(other[there]))
    elif kind == 5 and type(value) in (int, float) and abs(value) < 1e300:
      node[key] = pick.choice((-value, value + 1, value * 2, value * 10**6, str(value), float(value), value - 1))
    else:
      node[key] = pick.choice(ODD)
  return tree


def mutate_json(pick, data):
  """Mutates JSON as a tree, or as bytes where it is none."""
  if pick.random() < 0.15:
    return mutate_bytes(pick, data)
  try:
    tree = json.loads(data)
  except (ValueError, RecursionError):
    return mutate_bytes(pick, data)
  if pick.random() < 0.005:
    return b"[" * 100_000
  return json.dumps(mutate_tree(pick, tree)).encode()


def mutate_lines(pick, data):
  """Mutates one line of JSON lines."""
  lines = data.split(b"\n")
  at = pick.randrange(len(lines))
  lines[at] = mutate_json(pick, lines[at])
  if pick.random() < 0.2:
    lines.insert(at, pick.choice(lines))
  return b"\n".join(lines)


def mutate_zip(pick, data, inner):
  """Mutates a member of a zip with `inner(pick, name, content)` and keeps the archive whole."""
  if pick.random() < 0.2:
    return mutate_bytes(pick, data)
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      members = [(name, archive.read(name)) for name in archive.namelist()]
  except Exception:
    return mutate_bytes(pick, data)
  if not members:
    return mutate_bytes(pick, data)
  at = pick.randrange(len(members))
  name, content = members[at]
  kind = pick.randrange(12)
  if kind == 0:
    del members[at]
  elif kind == 1:
    members.append((name, mutate_bytes(pick, content)))
  elif kind == 2:
    members[at] = (mutate_bytes(pick, name.encode()).decode("latin1"), content)
  elif kind == 3:
    members[at] = (name, pick.choice(members)[1])
  else:
    members[at] = (name, inner(pick, name, content))
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, "w", pick.choice((0, 0, 8))) as archive:
    warnings.simplefilter("ignore")  # Names that appear twice.
    for name, content in members:
      archive.writestr(name.partition("\0")[0] or "x", content)  # zipfile ends a name there.
  return file.getvalue()


# ---- Readers: a valid input each, a mutation, and what reads the input and raises `UserError` at most ----
