"""Reads a compiled program: its products and what devices send each other.

The compiler's own cost analysis counts the body of a loop once, and a stack of
blocks is a loop. The text of the compiled program says how often each loop
runs, as far as that is known when compiling; here what stands in a loop counts
that often. All figures are of one device.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
import re

# Bytes of an element; types of less than a byte count as one.
_BYTES = {
  'pred': 1,
  's4': 1,
  'u4': 1,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
  'c64': 8,
  'c128': 16,
}
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# `ENTRY %main.5 (x.1: f32[2,4]) -> f32[2] {` begins a computation, a line such
# as `  ROOT %dot.3 = f32[2]{0} dot(%a, %b), lhs_contracting_dims={1}` is an
# instruction in it, and `}` at the margin ends it.
_HEAD = re.compile(r'(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$')
_LINE = re.compile(r'\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$')
_ARRAY = re.compile(
  r'\b(?P<type>[a-z]+\d*(?:e\d+m\d+\w*)?)\[(?P<dims>[\d,]*)\]'
)
_NAME = re.compile(r'%([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(\d+)"\}')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
# {{0,1},{2,3}}, or [2,2]<=[4]: so many groups of so many.
_GROUPS = re.compile(
  r'replica_groups=(\{\{(?P<first>[\d,]*)\}|\[\d+,(?P<size>\d+)\]<=)'
)
_BODY = re.compile(r'\bbody=%?([\w.\-]+)')
_CONDITION = re.compile(r'\bcondition=%?([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind.

  Attributes:
    count: how often one is carried out.
    bytes: sum over them of the larger of what goes in and what comes out.
  """

  count: float = 0.0
  bytes: float = 0.0

  def __add__(self, other: 'Traffic') -> 'Traffic':
    return Traffic(self.count + other.count, self.bytes + other.bytes)

  def times(self, rounds: float) -> 'Traffic':
    """So often."""
    return Traffic(self.count * rounds, self.bytes * rounds)


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a computation costs one device.

  Attributes:
    flops: of matrix products and convolutions, a multiply-add being two.
    collectives: traffic by kind.
    unknown_loops: loops whose number of rounds is not known when compiling;
      they count once.
  """

  flops: float = 0.0
  collectives: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    kinds = [*self.collectives, *other.collectives]
    return Cost(
      self.flops + other.flops,
      {
        kind: self.collectives.get(kind, Traffic())
        + other.collectives.get(kind, Traffic())
        for kind in kinds
      },
      self.unknown_loops + other.unknown_loops,
    )

  def times(self, rounds: float) -> 'Cost':
    """So often; an unknown loop stays one."""
    return Cost(
      self.flops * rounds,
      {kind: t.times(rounds) for kind, t in self.collectives.items()},
      self.unknown_loops,
    )

  @property
  def traffic(self) -> Traffic:
    """All kinds together."""
    return sum(self.collectives.values(), Traffic())


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """A line: what it makes, by which operation, of what, and the rest."""

  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  operation: str
  operands: tuple[str, ...]
  text: str

  @property
  def bytes(self) -> int:
    """Of all arrays it makes."""
    return sum(_size(kind, dims) for kind, dims in self.arrays)


def _size(kind: str, dims: tuple[int, ...]) -> int:
  return _BYTES.get(kind, 1) * math.prod(dims)


def read(text: str) -> Cost:
  """Adds up a program.

  Args:
    text: `compiled.as_text()`.

  Raises:
    ValueError: if it is no such text.
  """
  computations, entry = _parse(text)
  if not entry:
    raise ValueError('no compiled program: there is no ENTRY computation')
  # A computation may be called from many places; its text is read once.
  known: dict[str, Cost] = {}

  def cost_of(name: str) -> Cost:
    if name not in known:
      lines = computations.get(name, {})
      known[name] = sum(
        (_cost(line, lines, cost_of) for line in lines.values()), Cost()
      )
    return known[name]

  return cost_of(entry)


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  """Instructions by name, by computation; and the name of the first one."""
  computations: dict[str, dict[str, _Instruction]] = {}
  entry, current = '', None
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head is not None:
      current = computations.setdefault(head['name'], {})
      entry = head['name'] if head['entry'] else entry
    elif line.startswith('}'):
      current = None
    elif current is not None and (match := _LINE.match(line)):
      instruction = _instruction(match['rest'])
      if instruction is not None:
        current[match['name']] = instruction
  return computations, entry


def _instruction(rest: str) -> _Instruction | None:
  """Splits `TYPE operation(operands), attributes`; TYPE may be a tuple."""
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.find(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  operation, bracket, _ = rest.partition('(')
  if not bracket:
    return None
  close = _closing(rest, len(operation))
  arrays = tuple(
    (m['type'], tuple(int(d) for d in m['dims'].split(',') if d))
    for m in _ARRAY.finditer(kind)
  )
  operands = tuple(_NAME.findall(rest[len(operation) : close]))
  return _Instruction(arrays, operation.strip(), operands, rest[close:])


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if depth == 0:
      return i
  return len(text)


def _cost(
  line: _Instruction,
  lines: Mapping[str, _Instruction],
  cost_of: Callable[[str], Cost],
) -> Cost:
  if line.operation == 'while':
    body, condition = _BODY.search(line.text), _CONDITION.search(line.text)
    # A scan tells its rounds; a loop over blocks in use cannot.
    trips = _TRIPS.search(line.text)
    inside = cost_of(body[1]) if body else Cost()
    inside += cost_of(condition[1]) if condition else Cost()
    if trips is None:
      return inside + Cost(unknown_loops=1)
    return inside.times(int(trips[1]))
  if line.operation == 'conditional':
    names = _CALLED.findall(line.text)
    for branches in _BRANCHES.findall(line.text):
      names += _NAME.findall(branches)
    # Only one branch is taken, and nobody knows which: the dearest.
    costs = [cost_of(name) for name in names]
    return max(costs, key=lambda cost: cost.flops, default=Cost())
  # What goes on beside the computation has a start, which is counted, and a
  # `-done`, which is not.
  kind = line.operation.removesuffix('-start')
  if kind in COLLECTIVES and not _is_alone(line):
    return Cost(collectives={kind: _traffic(line, lines)})
  if line.operation == 'dot':
    return Cost(flops=_dot(line, lines))
  if line.operation == 'convolution':
    return Cost(flops=_convolution(line, lines))
  # Reductions and sorts also name a computation, of single elements.
  called = [
    name
    for name in _CALLED.findall(line.text)
    if line.operation in ('fusion', 'call', 'async-start', 'custom-call')
  ]
  return sum((cost_of(name) for name in called), Cost())


def _is_alone(line: _Instruction) -> bool:
  """Whether each device would talk to itself only; other compilers drop it."""
  match = _GROUPS.search(line.text)
  if match is None:
    return False
  first, size = match['first'], match['size']
  return size == '1' if size else bool(first) and ',' not in first


def _traffic(line: _Instruction, lines: Mapping[str, _Instruction]) -> Traffic:
  incoming = sum(lines[name].bytes for name in line.operands if name in lines)
  outgoing = line.bytes
  if line.operation.endswith('-start'):
    outgoing -= incoming  # its result holds the operands as well
  return Traffic(1.0, float(max(incoming, outgoing)))


def _shape(name: str, lines: Mapping[str, _Instruction]) -> tuple[int, ...]:
  return lines[name].arrays[0][1] if name in lines else ()


def _dot(line: _Instruction, lines: Mapping[str, _Instruction]) -> float:
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.text)
  left = _shape(line.operands[0], lines)
  dims = [int(d) for d in contracted[1].split(',') if d] if contracted else []
  depth = math.prod(left[d] for d in dims)
  return 2.0 * math.prod(line.arrays[0][1]) * depth


def _convolution(
  line: _Instruction, lines: Mapping[str, _Instruction]
) -> float:
  # In `b01f_01io->b01f` the kernel has space, inputs i and outputs o. Each
  # output element sums over all of the kernel but o.
  labels = re.search(r'dim_labels=\w+_(\w+)->', line.text)
  kernel = _shape(line.operands[1], lines)
  if labels is None or len(labels[1]) != len(kernel):
    return 0.0
  outputs = kernel[labels[1].index('o')]
  return 2.0 * math.prod(line.arrays[0][1]) * math.prod(kernel) / outputs
