"""Reads the text of a scheduled XLA program for GPUs: its kernels, how often each is launched, and what each moves.

A kernel is an instruction that the GPU executes by itself: a fusion, a call of a library, a copy, or an operation that
was not fused. A loop's kernels count as often as the loop runs. A loop whose length is data counts once.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BYTES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_FREE = {
  "after-all", "add-dependency", "bitcast", "constant", "domain", "get-dimension-size", "get-tuple-element",
  "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
_CALLS = {"call", "conditional", "while", "async-start"}
_READ_IN_PART = {"dynamic-slice", "gather", "slice"}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.$-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.$-]+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel of a program.

  Attributes:
    kind: 'convolution', 'product', 'fusion', 'copy', or the name of another operation.
    launches: how often one call of the program launches it.
    bytes: that one launch reads and writes at least.
    flop: of its products and convolutions.
    source: 'file:line function' of the innermost frame whose file matches `read`'s `package`; '' if there is none.
    module: the path of Flax modules that made it; '' if there is none.
  """

  kind: str
  launches: int
  bytes: int
  flop: int
  source: str
  module: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  operation: str
  arguments: str  # Between the parentheses.
  rest: str  # After them.

  @property
  def operands(self) -> list[str]:
    return _NAME.findall(self.arguments)


_Computations = dict[str, dict[str, _Instruction]]


def read(text: str, *, package: str = "jedi_jax") -> list[Kernel]:
  """Returns the kernels of a program.

  Args:
    text: `Compiled.as_text()` of a program for a GPU.
    package: directory of the code whose lines are named.

  Raises:
    ValueError: if the text has no entry computation.
  """
  computations, entry = _parse(text)
  frames = _frames(text, package)
  return [
    Kernel(
      kind=_kind(instruction, computations),
      launches=count,
      bytes=_moved(instruction, computations[place], computations),
      flop=_flop(instruction, computations[place], computations),
      source=frames.get(_field(instruction.rest, r"stack_frame_id=(\d+)"), ""),
      module=_module(_field(instruction.rest, r'op_name="([^"]*)"')),
    )
    for place, instruction, count in _executed(entry, 1, computations)
  ]


def loops_of_unknown_length(text: str) -> int:
  """Returns how many loops that the program executes have a length that is data."""
  computations, entry = _parse(text)
  return sum(
    instruction.operation == "while" and not _field(instruction.rest, _TRIPS)
    for _, instruction, _ in _executed(entry, 1, computations, loops=True)
  )


_TRIPS = r'known_trip_count":\{"n":"(\d+)"'


def _parse(text: str) -> tuple[_Computations, str]:
  computations: _Computations = {}
  entry, own = "", dict[str, _Instruction]()
  for line in text.splitlines():
    if not line[:1].isspace() and (head := _HEAD.match(line)):
      own = computations.setdefault(head[1], {})
      entry = head[1] if line.startswith("ENTRY") else entry
    elif found := _LINE.match(line):
      name, shape, operation, after = found.groups()
      own[name] = _Instruction(name, shape, operation, *_split(after))
  if not entry:
    raise ValueError("the text has no entry computation")
  return computations, entry


def _split(text: str) -> tuple[str, str]:
  """Splits the text after an opening parenthesis at the closing one."""
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[:i], text[i + 1 :]
  return text, ""


def _executed(
  place: str, count: int, computations: _Computations, *, loops: bool = False
) -> Iterator[tuple[str, _Instruction, int]]:
  """Yields computation, instruction and count of every kernel, and of loops if `loops`."""
  for instruction in computations[place].values():
    operation, rest = instruction.operation, instruction.rest
    if operation == "while":
      if loops:
        yield place, instruction, count
      times = count * int(_field(rest, _TRIPS) or 1)
      yield from _executed(_field(rest, r"body=%?([\w.$-]+)"), times, computations, loops=loops)
    elif operation in _CALLS:
      for name in _called(rest, computations):
        yield from _executed(name, count, computations, loops=loops)
    elif operation not in _FREE and not operation.endswith("-done") and not loops:
      yield place, instruction, count


def _called(rest: str, computations: _Computations) -> list[str]:
  """Returns the computations of a call; of a conditional the longest."""
  branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
  if branches:
    return [max(_NAME.findall(branches[1]), key=lambda name: len(computations[name]))]
  named = [_field(rest, rf"\b{key}=%?([\w.$-]+)") for key in ("true_computation", "false_computation")]
  if all(named):
    return [max(named, key=lambda name: len(computations[name]))]
  return [name for key in ("to_apply", "calls") if (name := _field(rest, rf"\b{key}=%?([\w.$-]+)")) in computations]


def _field(text: str, pattern: str) -> str:
  found = re.search(pattern, text)
  return found[1] if found else ""


def _fused(instruction: _Instruction, computations: _Computations) -> Mapping[str, _Instruction]:
  return computations.get(_field(instruction.rest, r"\bcalls=%?([\w.$-]+)"), {})


def _kind(instruction: _Instruction, computations: _Computations) -> str:
  target = _field(instruction.rest, r'custom_call_target="([^"]*)"')
  inside = {one.operation for one in _fused(instruction, computations).values()} | {instruction.operation}
  if "conv" in target or "convolution" in inside:
    return "convolution"
  if "gemm" in target or "matmul" in target or "dot" in inside:
    return "product"
  if instruction.operation == "custom-call":
    return target
  return instruction.operation.removesuffix("-start")


def _size(shape: str) -> int:
  """Returns the bytes of all arrays in the text of a shape."""
  return sum(_item(dtype) * _elements(dims) for dtype, dims in _SHAPE.findall(shape))


def _item(dtype: str) -> int:
  bits = re.search(r"\d+", dtype)
  return _BYTES[dtype] if dtype in _BYTES or not bits else max(int(bits[0]) // 8, 1)


def _elements(dims: str) -> int:
  return math.prod(int(size) for size in dims.split(",") if size)


def _moved(instruction: _Instruction, own: Mapping[str, _Instruction], computations: _Computations) -> int:
  """Returns the bytes that one launch reads and writes; of what it reads in part, that part."""
  sizes = [_size(own[name].shape) if name in own else 0 for name in instruction.operands]
  inside = _fused(instruction, computations)
  written = _size(instruction.shape)
  if any('custom_call_target="__cu' in one.rest for one in (instruction, *inside.values())):
    # The last of several results of cuBLAS and cuDNN is scratch memory.
    written -= sum(map(_size, re.findall(r"[su]8\[\d+\](?=[^,]*\)$)", instruction.shape)))
  needed = _needed(inside)
  for one in inside.values():
    if one.operation == "parameter":
      users = [user for user in inside.values() if one.name in user.operands]
      number = int(one.arguments)
      if users and all(user.operation == "dynamic-update-slice" and user.operands[0] == one.name for user in users):
        # Written in place: only the update is read and written.
        written -= sizes[number] - sum(_size(inside[user.operands[1]].shape) for user in users)
        sizes[number] = 0
      else:
        sizes[number] = round(sizes[number] * needed[one.name])
  if instruction.operation in _READ_IN_PART:
    sizes[:1] = [written]
  return max(written, 0) + sum(sizes)


def _needed(inside: Mapping[str, _Instruction]) -> dict[str, float]:
  """Returns the part of each array in a fusion that its results depend on: a slice needs no more of what it slices."""
  slices, others = dict.fromkeys(inside, 0.0), dict.fromkeys(inside, 0.0)
  used = {name for one in inside.values() for name in one.operands}
  needed = {}
  for one in reversed(inside.values()):  # Users come after what they use.
    part = needed[one.name] = min(slices[one.name] + others[one.name], 1.0) if one.name in used else 1.0
    for index, name in enumerate(one.operands):
      if name in inside:
        ratio = part * _size(one.shape) / max(_size(inside[name].shape), 1)
        if one.operation in _READ_IN_PART and index == 0:
          slices[name] += ratio
        else:
          others[name] = max(others[name], min(ratio, 1.0) if one.operation == "broadcast" else part)
  return needed


def _flop(instruction: _Instruction, own: Mapping[str, _Instruction], computations: _Computations) -> int:
  target = _field(instruction.rest, r'custom_call_target="([^"]*)"')
  if "gemm" in target or "matmul" in target or instruction.operation == "dot":
    return _product_flop(instruction, own)
  if "conv" in target or instruction.operation == "convolution":
    return _convolution_flop(instruction, own, target)
  if target.endswith("triton"):
    # A kernel of ours multiplies images [..., B, P, I] by matrices [..., rows, O] to [..., B, P, O]. Those of queries,
    # keys and values are [..., rows, 3 O], where rows is a multiple of O.
    result = _dims(instruction.shape)
    shapes = [_dims(own[name].shape) for name in instruction.operands]
    matrices = [shape[-2:] for shape in shapes if len(shape) == len(result) - 1]
    outputs = result[-1]
    factors = [
      rows * columns // outputs
      for rows, columns in matrices
      if columns == outputs or (columns == 3 * outputs and rows % outputs == 0)
    ]
    return 2 * math.prod(result) * sum(factors)
  inside = _fused(instruction, computations)
  nested = (one for one in inside.values() if one.operation in ("dot", "convolution", "fusion"))
  return sum(_flop(one, inside, computations) for one in nested)


def _dims(shape: str) -> list[int]:
  found = _SHAPE.search(shape)
  return [int(size) for size in found[2].split(",") if size] if found else []


def _product_flop(instruction: _Instruction, own: Mapping[str, _Instruction]) -> int:
  numbers = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]"?([\d",]*)', instruction.rest)
  left = _dims(own[instruction.operands[0]].shape)
  contracted = [int(i) for i in re.findall(r"\d+", numbers[1])] if numbers else []
  return 2 * math.prod(_dims(instruction.shape)) * math.prod(left[i] for i in contracted)


def _convolution_flop(instruction: _Instruction, own: Mapping[str, _Instruction], target: str) -> int:
  """Twice the elements of the forward result, times those of the kernel, over its output channels."""
  shapes = [_dims(own[name].shape) for name in instruction.operands[:2]]
  result = _dims(instruction.shape)
  forward, kernel = {
    "BackwardInput": (shapes[0], shapes[1]),
    "BackwardFilter": (shapes[1], result),
  }.get(_field(target, r"(Backward(?:Input|Filter))"), (result, shapes[1]))
  labels = _field(instruction.rest, r"dim_labels=\w+_(\w+)->")
  outputs = kernel[labels.index("o")] if "o" in labels else 1
  return 2 * math.prod(forward) * math.prod(kernel) // max(outputs, 1)


def _module(name: str) -> str:
  """Returns the path of Flax modules in the name of an operation: parts from the first that ends in 'Network'."""
  parts = name.split("/")
  for i, part in enumerate(parts):
    if "Network" in part:
      return "/".join([re.sub(r"^.*\(|\)+$", "", part), *parts[i + 1 : -1]])
  return ""


def _frames(text: str, package: str) -> dict[str, str]:
  """Returns by number of a stack frame the innermost line in the package's directory."""
  tables: dict[str, dict[int, str]] = {}
  own: dict[int, str] = {}
  for line in text.splitlines():
    if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
      own = tables.setdefault(line, {})
    elif (number := re.match(r"(\d+) (.*)", line)) and tables:
      own[int(number[1])] = number[2]
    elif line.startswith(("%", "ENTRY")):
      break
  files, functions, locations = (tables.get(name, {}) for name in ("FileNames", "FunctionNames", "FileLocations"))

  def describe(frame: int, depth: int = 0) -> str:
    fields = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", tables["StackFrames"].get(frame, ""))}
    if not fields or depth > 200:
      return ""
    place = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", locations.get(fields["file_location_id"], ""))}
    path = json.loads(files.get(place.get("file_name_id", 0), '""'))
    if f"/{package}/" in path:
      function = json.loads(functions.get(place["function_name_id"], '""')).replace("<locals>.", "")
      return f"{path.rsplit(f'/{package}/', 1)[1]}:{place['line']} {function}"
    return describe(fields.get("parent_frame_id", 1) - 1, depth + 1)  # The text counts parents from 1, 0 being none.

  return {str(frame): describe(frame) for frame in tables.get("StackFrames", {})}


def total(kernels: Sequence[Kernel], *, by: str = "") -> dict[str, dict[str, int]]:
  """Adds up launches, bytes and operations.

  Args:
    kernels: of a program.
    by: 'kind', 'source' or 'module'; everything together, under '', if empty.

  Returns:
    'launches', 'bytes' and 'flop' by the value of that attribute, most launches first.
  """
  sums: dict[str, dict[str, int]] = {}
  for kernel in kernels:
    own = sums.setdefault(getattr(kernel, by) if by else "", {"launches": 0, "bytes": 0, "flop": 0})
    own["launches"] += kernel.launches
    own["bytes"] += kernel.launches * kernel.bytes
    own["flop"] += kernel.launches * kernel.flop
  return dict(sorted(sums.items(), key=lambda item: -item[1]["launches"]))


def seconds(kernels: Sequence[Kernel], *, launch: float, bandwidth: float, peak: float) -> float:
  """Estimates the time of a call: the sum over kernels of the largest of three costs.

  Args:
    kernels: of the program.
    launch: seconds of a launch.
    bandwidth: of the memory, in bytes a second.
    peak: operations a second of products and convolutions.
  """
  return sum(k.launches * max(launch, k.bytes / bandwidth, k.flop / peak) for k in kernels)
