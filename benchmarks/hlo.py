"""What can be read from the text of a compiled program: collectives, traffic, changes of layout.

The text is that of `jax.stages.Compiled.as_text()`, an optimized and scheduled HLO module of one
device. The body of a loop counts once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
# Instructions that move nothing, or whose traffic is counted with another instruction.
_FREE = ('parameter', 'constant', 'bitcast', 'tuple', 'get-tuple-element', 'iota', 'after-all')
_LOOKED_THROUGH = ('bitcast', 'get-tuple-element', 'copy-start', 'copy-done', 'tuple')

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class ArrayType:
  """The type of an array.

  Attributes:
    size: its bytes, without padding.
    order: its axes from the fastest to the slowest; empty for scalars.
    in_main_memory: whether it lies in the main memory of the device, HBM.
  """

  size: int
  order: tuple[int, ...]
  in_main_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a module.

  Attributes:
    name: its name.
    types: the types of its results.
    opcode: what it does, such as 'fusion'.
    operands: the names of its operands.
    rest: the text behind the operands.
  """

  name: str
  types: tuple[ArrayType, ...]
  opcode: str
  operands: tuple[str, ...]
  rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """A communication between devices.

  Attributes:
    kind: such as 'all-reduce'.
    size: the bytes of its results on one device.
    group: the number of devices that take part together.
  """

  kind: str
  size: int
  group: int

  def sent(self) -> float:
    """The bytes that a device sends when the devices form a ring."""
    others = self.group - 1
    shares = {
      'all-reduce': 2 * others / self.group,
      'all-gather': others / self.group,
      'all-to-all': others / self.group,
      'reduce-scatter': others,
      'collective-permute': 1,
    }
    return shares[self.kind] * self.size


def _types(text: str) -> tuple[ArrayType, ...]:
  types = []
  for kind, dims, order, extra in _ARRAY.findall(text):
    bits = _BITS.get(kind) if kind in _BITS else int(re.search(r'\d+', kind).group())
    size = bits * math.prod(int(d) for d in dims.split(',') if d) // 8
    axes = tuple(int(axis) for axis in order.split(',') if axis)
    types.append(ArrayType(size, axes, not re.search(r'S\([1-9]', extra)))
  return tuple(types)


def _split_type(text: str) -> tuple[str, str]:
  """The type at the start of an instruction, and the rest."""
  if not text.startswith('('):
    return tuple(text.split(' ', 1))
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return text[: i + 1], text[i + 2 :]
  raise ValueError(f'unbalanced brackets: {text[:80]}')


def _instruction(text: str, name: str) -> Instruction:
  kind, rest = _split_type(text)
  opcode, rest = rest.split('(', 1)
  operands, _, rest = rest.partition(')')
  names = tuple(re.findall(r'%([\w.\-]+)', operands))
  return Instruction(name, _types(kind), opcode.strip(), names, rest)


class Module:
  """A parsed module.

  Attributes:
    computations: the instructions of each computation, by its name.
    entry: the name of the computation that the program starts with.

  Args:
    text: the text of the module.
  """

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ''
    current: list[Instruction] = []
    for line in text.splitlines():
      if header := _COMPUTATION.match(line):
        current = self.computations.setdefault(header[2], [])
        self.entry = header[2] if header[1] else self.entry
      elif instruction := _INSTRUCTION.match(line):
        current.append(_instruction(instruction[3], instruction[2]))

  def called(self, instruction: Instruction) -> list[str]:
    """The names of the computations that a fusion, a loop or the like runs."""
    names = re.findall(
      r'(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)', instruction.rest
    )
    for group in re.findall(r'branch_computations=\{([^}]*)\}', instruction.rest):
      names += re.findall(r'%?([\w.\-]+)', group)
    return [name for name in names if name in self.computations]

  @functools.cached_property
  def scheduled(self) -> list[str]:
    """The computations whose instructions run one by one: the entry, and those of its loops."""
    names, todo = [], [self.entry]
    while todo:
      names.append(todo.pop())
      for instruction in self.computations[names[-1]]:
        if instruction.opcode in ('while', 'conditional', 'call'):
          todo += [name for name in self.called(instruction) if name not in names + todo]
    return names

  def count(self, opcode: str) -> int:
    """The number of instructions of this kind."""
    return sum(i.opcode == opcode for part in self.computations.values() for i in part)

  def _run(self) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
    for name in self.scheduled:
      by_name = {instruction.name: instruction for instruction in self.computations[name]}
      for instruction in by_name.values():
        yield instruction, by_name

  def collectives(self, num_devices: int) -> list[Collective]:
    """All collectives; those of which the text does not list groups are between all devices."""
    found = []
    for instructions in self.computations.values():
      for instruction in instructions:
        kind = instruction.opcode.removesuffix('-done')
        if kind in _COLLECTIVES:
          size = sum(array.size for array in instruction.types)
          found.append(Collective(kind, size, _group(instruction.rest, num_devices)))
    return found

  def main_memory_bytes(self) -> int:
    """Bytes that the instructions read from and write to the main memory of the device.

    All operands and results that lie there count as a whole, even if a fusion reads a slice only.
    """
    total = 0
    for instruction, by_name in self._run():
      if instruction.opcode in (*_FREE, 'while', 'conditional', 'call'):
        continue
      if instruction.opcode.endswith('-done'):
        continue
      if instruction.opcode == 'copy-start':  # (target, source, context)
        total += sum(a.size for a in instruction.types[:2] if a.in_main_memory)
        continue
      arrays = [*instruction.types]
      for name in instruction.operands:
        arrays += by_name[name].types if name in by_name else ()
      total += sum(array.size for array in arrays if array.in_main_memory)
    return total

  def estimated_cycles(self) -> int:
    """The sum of the cycles that the TPU compiler estimates for the instructions that run."""
    return sum(
      int(number)
      for name in self.scheduled
      for instruction in self.computations[name]
      for number in _CYCLES.findall(instruction.rest)[:1]
    )

  def layout_changes(self) -> dict[str, int]:
    """Copies and transposes that change the order of axes in memory.

    Returns:
      Their number, `count`; the bytes of their results, `bytes`; and the number `at_convolutions`
      of those whose operand or user is a convolution with a window, or that are fused with one.
    """
    count = size = beside = 0
    for instruction, by_name in self._run():
      results = self._changes(instruction, by_name)
      count += len(results)
      size += sum(results)
      if results and (self._convolves(instruction) or self._meets(instruction, by_name)):
        beside += len(results)
    return {'count': count, 'bytes': size, 'at_convolutions': beside}

  def _changes(self, instruction: Instruction, by_name: dict[str, Instruction]) -> list[int]:
    """The bytes of each change of layout in an instruction and in what is fused into it."""
    if instruction.opcode == 'fusion':
      return [
        change
        for name in self.called(instruction)
        for inner in self.computations[name]
        for change in self._changes(inner, {i.name: i for i in self.computations[name]})
      ]
    if instruction.opcode == 'transpose':
      return [instruction.types[0].size]
    if instruction.opcode == 'copy' and instruction.operands[0] in by_name:
      (target,), (source,) = instruction.types, by_name[instruction.operands[0]].types
      return [target.size] if target.order != source.order else []
    return []

  def _convolves(self, instruction: Instruction) -> bool:
    if instruction.opcode == 'fusion':
      return any(
        self._convolves(inner)
        for name in self.called(instruction)
        for inner in self.computations[name]
      )
    if instruction.opcode == 'custom-call':
      return '"__cudnn$conv' in instruction.rest
    return instruction.opcode == 'convolution' and 'window={' in instruction.rest

  def _meets(self, instruction: Instruction, by_name: dict[str, Instruction]) -> bool:
    """Whether an operand or a user, seen through bitcasts and prefetches, is a convolution."""

    def seen(name: str, step: dict[str, list[str]], depth: int = 4) -> bool:
      for other in step.get(name, []):
        if other in by_name and self._convolves(by_name[other]):
          return True
        through = other in by_name and by_name[other].opcode in _LOOKED_THROUGH
        if through and depth and seen(other, step, depth - 1):
          return True
      return False

    operands, users = self._neighbours(by_name)
    return seen(instruction.name, operands) or seen(instruction.name, users)

  def _neighbours(
    self, by_name: dict[str, Instruction]
  ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    cache = self.__dict__.setdefault('_neighbour_cache', {})
    key = next(iter(by_name))
    if key not in cache:
      operands = {name: list(i.operands) for name, i in by_name.items()}
      users: dict[str, list[str]] = {}
      for name, sources in operands.items():
        for source in sources:
          users.setdefault(source, []).append(name)
      cache[key] = operands, users
    return cache[key]


def _group(rest: str, num_devices: int) -> int:
  """The number of devices in the first of the `replica_groups`."""
  if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', rest):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', rest):
    return int(iota[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return listed[1].count(',') + 1
  return num_devices
