"""What a compiled program does, counted from its HLO text: nothing here is executed.

XLA's own `cost_analysis` counts the body of a loop once, whatever its trip count. Here
every instruction counts as often as it runs: bodies of (nested) loops are multiplied by
their trip counts, which are read off the condition and the step of the loop's counter.

FLOPs are those of matrix products and convolutions, two for each multiplication with an
element that exists (not padding, not the holes of a dilation), from shapes alone.
Bytes of memory are those that each instruction reads and writes in the device's main
memory ("HBM"), a fusion once however many instructions it holds, slices as slices, tile
padding included; buffers that the compiler keeps on the chip (TPU: VMEM) are free.
Each count belongs to a part of the program: the innermost `jax.named_scope` of those
asked for, which every instruction names in its metadata.
The text format: https://openxla.org/xla/operation_semantics.
"""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from clj.cli import UserError

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)
# Bits of the element types; f8 and others in names that end in their width are parsed.
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
# What moves no data: names of values, and what is counted where it was started.
FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "add-dependency",
  "opt-barrier",
  "optimization-barrier",
  "partition-id",
  "replica-id",
  "domain",
  "while",
  "conditional",
  "call",
  "async-start",
}
PRODUCTS = ("dot", "convolution", "custom-call")
AGAIN = "rematted_computation"  # in the names of what `jax.checkpoint` computes again
OTHER = "other"  # the part of what is in no scope
# Calls that only give memory a name.
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


class Array(NamedTuple):
  """One array of an HLO shape."""

  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bits(self) -> int:
    digits = re.match(r"[a-z]+(\d+)", self.dtype)
    return BITS[self.dtype] if self.dtype in BITS else int(digits[1]) if digits else 32

  @property
  def bytes(self) -> int:
    return -(-math.prod(self.dims) * self.bits // 8)

  @property
  def in_hbm(self) -> bool:
    """Whether it lies in the device's main memory, space 0."""
    space = re.search(r"S\((\d+)\)", self.layout)
    return space is None or space[1] == "0"

  @property
  def hbm_bytes(self) -> int:
    """Bytes in main memory, the padding of its tiles included; 0 elsewhere."""
    if not self.in_hbm:
      return 0
    order, _, tiles = self.layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    if not tile or not self.dims:
      return self.bytes
    dims = [self.dims[int(i)] for i in order.split(",")][::-1]  # minor-most last
    sizes = [int(n) for n in tile[1].split(",")]
    for i, size in enumerate(sizes, len(dims) - len(sizes)):
      if i >= 0:
        dims[i] = -(-dims[i] // size) * size
    return -(-math.prod(dims) * self.bits // 8)


class Instruction(NamedTuple):
  name: str
  opcode: str
  shape: tuple[Array, ...]  # of a tuple: its arrays, in order, nesting flattened
  operands: tuple[str, ...]
  argument: str  # what stands in the parentheses: the value of a constant
  attributes: str


class Computation(NamedTuple):
  instructions: dict[str, Instruction]
  root: str


class Collective(NamedTuple):
  """One collective operation, as one device sees it.

  kind: of `KINDS`. bytes: an all-reduce's array, an all-gather's result, the operands
  of the others. group: how many devices take part. first: their numbers, of the first
  group, in the order of the mesh. count: how often it runs in a step. place: the
  operation of the program that it came from. part: its scope, see `analyse`.
  """

  kind: str
  bytes: int
  group: int
  first: tuple[int, ...]
  count: int
  place: str
  part: str = ""

  @property
  def wire(self) -> float:
    """Bytes that a device has to send at least, each time."""
    n = self.group
    if self.kind == "collective-permute":
      return self.bytes
    return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


class Part(NamedTuple):
  """What falls to one part of the program.

  flops: of products and convolutions. passes: the same, weighted by the passes through
  the matrix unit that a TPU needs for the precision (1 for bfloat16, 3 for "high", 6
  for "highest" of float32). recomputed: FLOPs that `jax.checkpoint` spends again in the
  backward pass. hbm_bytes: read and written.
  """

  flops: float = 0.0
  passes: float = 0.0
  recomputed: float = 0.0
  hbm_bytes: float = 0.0

  def plus(self, other: "Part", times: int = 1) -> "Part":
    return Part(*(a + times * b for a, b in zip(self, other)))


class Cost(NamedTuple):
  """What one device does in one run of the program.

  flops, passes, recomputed, hbm_bytes: of all parts, see `Part`. loops: (name of the
  body, trip count or None if it is not in the program) of every loop, outermost first.
  parts: by scope.
  """

  flops: float
  passes: float
  recomputed: float
  hbm_bytes: float
  collectives: tuple[Collective, ...]
  loops: tuple[tuple[str, int | None], ...]
  parts: dict[str, Part]


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """HLO text -> (computations by name, name of the entry)."""
  computations, entry, current, root = {}, None, None, None
  for line in text.splitlines():
    if current is None:
      header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line)
      if header and "->" in line:
        name, current, root = header[2], {}, None
        entry = name if header[1] else entry
    elif re.match(r"\}(?!\})", line):  # "}}": the end of an attribute of several lines
      computations[name] = Computation(current, root)
      current = None
    elif instruction := _instruction(line):
      current[instruction.name] = instruction
      if line.lstrip().startswith("ROOT "):
        root = instruction.name
  if entry is None:
    raise UserError("this is no HLO text: it has no ENTRY computation")
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
  if head is None:
    return None
  rest = line[head.end() :]
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, _ = rest.partition("(")
  rest = rest[len(opcode) :]
  end = _closing(rest)
  inside, attributes = rest[1:end], rest[end + 1 :]
  literal = opcode in ("constant", "parameter")
  operands = () if literal else tuple(re.findall(r"%([\w.-]+)", inside))
  return Instruction(head[1], opcode, arrays(shape), operands, inside, attributes)


def _closing(text: str) -> int:
  """Index of the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r"[()]", text):
    depth += 1 if match[0] == "(" else -1
    if not depth:
      return match.start()
  raise UserError(f"unbalanced parentheses in HLO: {text[:80]!r}")


@functools.lru_cache(maxsize=65536)
def arrays(shape: str) -> tuple[Array, ...]:
  """The arrays of an HLO shape, the elements of a tuple in order."""
  found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
  return tuple(
    Array(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n), layout)
    for dtype, dims, layout in found
  )


def analyse(text: str, scopes: tuple[str, ...] = ()) -> Cost:
  """Counts what the compiled program `text` (`compiled.as_text()`) does on a device.

  scopes: names of `jax.named_scope`; of nested ones the innermost counts, in the
    forward and the backward pass. What is in none is the part `OTHER`.
  """
  walk = _Walk(*parse(text), scopes)
  walk.computation(walk.entry, 1, {}, fused=False, part=OTHER)
  parts = {name: walk.parts.get(name, Part()) for name in (*scopes, OTHER)}
  return Cost(*walk.total(), tuple(walk.collectives), tuple(walk.loops), parts)


def step_flops(compiled) -> float:
  """FLOPs of one device in one run of a compiled program, loops by their trip counts.

  Those of the model: what `jax.checkpoint` computes again in the backward pass does not
  count (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).
  """
  cost = analyse(compiled.as_text())
  return cost.flops - cost.recomputed


@functools.lru_cache(maxsize=65536)
def scope(op_name: str, scopes: tuple[str, ...]) -> str | None:
  """The innermost of the scopes in a name such as "jit(f)/transpose(jvp(loss))/add"."""
  if not scopes:
    return None
  # A function of that name that was jitted is none.
  found = re.findall(
    rf"(?<!jit\()(?:^|(?<=[/(]))(?:{'|'.join(scopes)})(?=[/)]|$)", op_name
  )
  return found[-1] if found else None


class _Walk:
  """Adds up the program, computation by computation, as often as each runs."""

  def __init__(self, computations, entry, scopes):
    self.computations, self.entry, self.scopes = computations, entry, scopes
    self.parts = {}
    self.collectives, self.loops = [], []
    self.seen, self.fusions = set(), {}

  def total(self) -> Part:
    return functools.reduce(Part.plus, self.parts.values(), Part())

  def add(self, part, cost: Part, times):
    self.parts[part] = self.parts.get(part, Part()).plus(cost, times)

  def computation(self, name, times, known, fused, part, host=None):
    """known: values of the integer scalars among the elements of its parameter.

    part: what the computation was called from.
    """
    body = self.computations[name]
    host = host or name  # the computation that is executed: not a fusion's inside
    parts = self.parts_of(body)
    for one in body.instructions.values():
      opcode = one.opcode
      mine = parts[one.name] or part
      if opcode in PRODUCTS:
        cost = _flops(one, body)
        again = cost.flops if self.is_again(_place(one)) else 0.0
        self.add(mine, cost._replace(recomputed=again), times)
      if opcode.removesuffix("-start") in KINDS:
        self.collective(one, body, times, host, name, mine)
      if not fused and opcode not in FREE and not opcode.endswith("-done"):
        self.add(mine, Part(hbm_bytes=self.traffic(one, body)), times)
      if opcode == "fusion":
        self.computation(_called(one, "calls"), times, {}, True, mine, host)
      elif opcode in ("call", "async-start"):
        target = _called(one, "to_apply") or _called(one, "calls")
        values = {
          i: _value(self.computations, body, x, known)
          for i, x in enumerate(one.operands)
        }
        self.computation(target, times, values, fused, mine)
      elif opcode == "conditional":
        # The branches exclude each other: the dearest counts.
        self.branches(one, times, fused, mine)
      elif opcode == "while":
        self.loop(one, body, times, known, mine)

  @functools.cached_property
  def forward(self):
    """Names of the products of the forward pass."""
    ones = (i for c in self.computations.values() for i in c.instructions.values())
    names = {_place(one) for one in ones if one.opcode in PRODUCTS}
    return {n for n in names if "transpose(" not in n and AGAIN not in n}

  def is_again(self, name) -> bool:
    """Whether a product is there twice, as `jax.checkpoint` has it.

    Compilers may find that the two are the same, and keep the name of the second.
    """
    _, there, rest = name.rpartition(AGAIN)
    return bool(there) and any(n.endswith(rest) for n in self.forward)

  def parts_of(self, body) -> dict[str, str | None]:
    """The part of each instruction; copies that the compiler made belong to a user."""
    parts = {name: self.part(one) for name, one in body.instructions.items()}
    # What comes from the program has a path, an argument its name.
    nameless = [
      one
      for name, one in body.instructions.items()
      if parts[name] is None
      and ("/" not in _place(one) or one.opcode in ("get-tuple-element", "bitcast"))
    ]
    users = {}
    for one in body.instructions.values():
      if one.opcode != "tuple":  # the results, which would tell nothing
        for x in one.operands:
          users.setdefault(x, []).append(one.name)
    for one in reversed(nameless):
      parts[one.name] = next(
        (parts[x] for x in users.get(one.name, ()) if parts[x]), None
      )
    for one in nameless:  # of results: of what made them
      made = (parts[x] for x in one.operands if parts[x])
      parts[one.name] = parts[one.name] or next(made, None)
    return parts

  def part(self, one) -> str | None:
    """The part of an instruction by its name, of a fusion by most of what it does."""
    own = scope(_place(one), self.scopes)
    if one.opcode != "fusion":
      return own
    flops, held = self.inside(_called(one, "calls"))
    most = lambda found: max(found, key=found.get) if found else None
    return most(flops) or own or most(held)

  def inside(self, name):
    """(FLOPs, bytes of results) of what stands in a fused computation, by part."""
    if name not in self.fusions:
      flops, held = {}, {}
      body = self.computations[name]
      for one in body.instructions.values():
        part = self.part(one)
        if part is None:
          continue
        if one.opcode == "fusion":
          more = self.inside(_called(one, "calls"))[0]
        elif one.opcode in PRODUCTS and (count := _flops(one, body).flops):
          more = {part: count}
        else:
          more = {}
        for key, value in more.items():
          flops[key] = flops.get(key, 0) + value
        held[part] = held.get(part, 0) + sum(a.bytes for a in one.shape)
      self.fusions[name] = flops, held
    return self.fusions[name]

  def branches(self, one, times, fused, part):
    names = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    names = re.findall(r"[\w.-]+", names[1]) if names else []
    names += re.findall(r"(?:true|false)_computation=%?([\w.-]+)", one.attributes)
    walks = []
    for name in names:
      walk = _Walk(self.computations, name, self.scopes)
      walk.computation(name, times, {}, fused, part)
      walks.append(walk)
    cost = lambda walk: (walk.total().flops, walk.total().hbm_bytes)
    dearest = max(walks, key=cost)
    for name, found in dearest.parts.items():
      self.add(name, found, 1)
    self.collectives += dearest.collectives
    self.loops += dearest.loops

  def loop(self, one, body, times, known, part):
    name, condition = _called(one, "body"), _called(one, "condition")
    carried = body.instructions[one.operands[0]]
    start = {}
    if carried.opcode == "tuple":
      start = {
        i: _value(self.computations, body, x, known)
        for i, x in enumerate(carried.operands)
      }
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
    if trips:
      trips = int(trips[1])
    else:
      trips = _trips(self.computations, name, condition, start)
    self.loops.append((name, trips))
    # What the body hands on unchanged is known inside it too.
    inside = self.computations[name]
    root = inside.instructions[inside.root]
    same = {
      i: start.get(i)
      for i, x in enumerate(root.operands if root.opcode == "tuple" else ())
      if _element(inside, x) == i
    }
    times *= 1 if trips is None else trips
    self.computation(name, times, same, False, part)

  def collective(self, one, body, times, host, name, part):
    # A TPU program repeats an asynchronous collective in each fusion that it overlaps.
    channel = re.search(r"channel_id=(\d+)", one.attributes)
    key = (host, channel[1] if channel else one.name)
    if key in self.seen:
      return
    self.seen.add(key)
    kind = one.opcode.removesuffix("-start")
    if name.startswith("all-reduce-scatter"):
      kind = "reduce-scatter"  # a TPU's: a fusion that keeps a slice of the sum
    operands = [a for x in one.operands for a in body.instructions[x].shape]
    if kind == "collective-permute":
      operands = operands[:1]  # the others of a -start are its buffers
    size = sum(a.bytes for a in operands)
    group = _group(one.attributes)
    self.collectives.append(
      Collective(
        kind,
        size * (len(group) if kind == "all-gather" else 1),
        len(group),
        group,
        times,
        _place(one) or one.name,
        part,
      )
    )

  def traffic(self, one, body):
    """Bytes of main memory that an instruction reads and writes."""
    operands = [body.instructions[x].shape for x in one.operands]
    # Chained accesses of one buffer count once each; tuples pass for their arrays.
    reads = [sum(a.hbm_bytes for a in shape) for shape in operands]
    result = sum(a.hbm_bytes for a in one.shape)
    if one.opcode in ("copy-start", "slice-start"):
      # The results are (copy, original, context) and (original, slice, context).
      made = one.shape[0 if one.opcode == "copy-start" else -2]
      return made.hbm_bytes + _at_home(made, operands[0][0]).hbm_bytes
    if one.opcode == "custom-call" and _target(one) in FREE_CALLS:
      return 0
    if one.opcode.removesuffix("-start") in KINDS:
      size = sum(
        a.hbm_bytes for a in one.shape[: len(one.shape) - _context(one, operands)]
      )
      return sum(reads) + size
    if one.opcode in ("dynamic-slice", "slice"):
      return result + min(reads[0], result)
    if one.opcode == "gather":
      return result + min(reads[0], result) + reads[1]
    if one.opcode == "dynamic-update-slice":
      return 2 * reads[1]
    if one.opcode == "scatter":
      return 3 * reads[-1] + reads[1]
    if one.opcode == "fusion":
      inside = self.computations[_called(one, "calls")]
      return self.fusion(inside, operands, one.shape)
    return sum(reads) + result

  def read(self, inside, name, home, whole):
    """Bytes that a fusion reads of one operand, at most `whole`."""
    part = 0
    for user, position in _users(inside, name):
      if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
        part += sum(_at_home(a, home).hbm_bytes for a in user.shape)
      elif user.opcode == "fusion":
        inner = self.computations[_called(user, "calls")]
        for one in inner.instructions.values():
          if one.opcode == "parameter" and int(one.argument) == position:
            part += self.read(inner, one.name, home, whole)
      elif user.opcode == "bitcast":
        part += self.read(inside, user.name, home, whole)
      elif user.opcode != "dynamic-update-slice" or position:  # that writes in place
        return whole
    return part

  def fusion(self, inside, operands, shape):
    """A fusion reads its operands once, or the slices that it takes of them."""
    total = 0
    for one in inside.instructions.values():
      if one.opcode == "parameter":
        home = operands[int(one.argument)]
        if whole := sum(a.hbm_bytes for a in home):
          total += min(whole, self.read(inside, one.name, home[0], whole))
    root = inside.instructions[inside.root]
    outputs = root.operands if root.opcode == "tuple" else (root.name,)
    for name, array in zip(outputs, shape):
      made = inside.instructions[name]
      while made.opcode in ("bitcast", "copy", "reshape"):
        made = inside.instructions[made.operands[0]]
      if made.opcode == "dynamic-update-slice":
        update = inside.instructions[made.operands[1]].shape[0]
        total += min(_at_home(update, array).hbm_bytes, array.hbm_bytes)
      else:
        total += array.hbm_bytes
    return total


def _users(inside, name):
  """(instruction, position among its operands) of every use."""
  for user in inside.instructions.values():
    for position, x in enumerate(user.operands):
      if x == name:
        yield user, position


def _at_home(array, home):
  """`array`, a part of `home`, with the memory space of that."""
  space = "" if home.in_hbm else "S(1)"
  return array._replace(layout=re.sub(r"S\(\d+\)", "", array.layout) + space)


def _context(one, operands):
  """How many arrays of a -start's result are not its output."""
  if not one.opcode.endswith("-start") or one.opcode == "all-reduce-start":
    return 0
  return max(0, len(one.shape) - sum(len(shape) for shape in operands))


def _called(one, attribute):
  found = re.search(rf"\b{attribute}=%?([\w.-]+)", one.attributes)
  return found[1] if found else None


def _place(one):
  """The operation of the program that an instruction comes from, or ""."""
  found = re.search(r'op_name="([^"]*)"', one.attributes)
  return found[1] if found else ""


def _target(one):
  found = re.search(r'custom_call_target="([^"]*)"', one.attributes)
  return found[1] if found else ""


def _numbers(attributes, name):
  found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
  return [int(n) for n in found[1].split(",") if n] if found else []


# Trip counts.


def _element(body, name):
  """Which element of the computation's parameter `name` is, handed through; or None."""
  one = body.instructions[name]
  while one.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
    one = body.instructions[one.operands[0]]
  if one.opcode != "get-tuple-element":
    return None
  if body.instructions[one.operands[0]].opcode != "parameter":
    return None
  return int(re.search(r"index=(\d+)", one.attributes)[1])


def _value(computations, body, name, known):
  """The value of an integer scalar, or None if it is not in the program."""
  one = body.instructions[name]
  if len(one.shape) == 1 and one.shape[0].dims:
    return None  # of arrays, whose makers are many, nothing is asked
  value = lambda x: _value(computations, body, x, known)
  if one.opcode == "constant":
    return int(one.argument) if re.fullmatch(r"-?\d+", one.argument) else None
  if one.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert", "reshape"):
    return value(one.operands[0])
  if one.opcode == "parameter":
    return known.get(int(one.argument))
  if one.opcode == "get-tuple-element":
    element = _element(body, name)
    return None if element is None else known.get(element)
  if one.opcode in ("add", "subtract", "multiply"):
    a, b = map(value, one.operands)
    if a is None or b is None:
      return None
    return {"add": a + b, "subtract": a - b, "multiply": a * b}[one.opcode]
  if one.opcode == "fusion":
    inside = computations[_called(one, "calls")]
    inputs = {i: value(x) for i, x in enumerate(one.operands)}
    return _value(computations, inside, inside.root, inputs)
  return None


def _trips(computations, body_name, condition_name, start):
  """How often a loop with a counter runs, or None."""
  inside, condition = computations[body_name], computations[condition_name]
  test, scope, through = condition.instructions[condition.root], condition, None
  if test.opcode == "fusion":
    through = test.operands
    scope = computations[_called(test, "calls")]
    test = scope.instructions[scope.root]
  if test.opcode != "compare":
    return None

  def place(name):
    """The element of the carried tuple that is compared, or None."""
    if through is None:
      return _element(scope, name)
    one = scope.instructions[name]
    if one.opcode != "parameter":
      return None
    return _element(condition, through[int(one.argument)])

  def value(name):
    if through is None:
      return _value(computations, scope, name, start)
    inputs = {
      i: _value(computations, condition, x, start) for i, x in enumerate(through)
    }
    return _value(computations, scope, name, inputs)

  direction = re.search(r"direction=(\w+)", test.attributes)[1]
  turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
  root = inside.instructions[inside.root]
  if root.opcode != "tuple":
    return None
  for counter, limit, sign in (
    (*test.operands, direction),
    (*test.operands[::-1], turned.get(direction, direction)),
  ):
    element, first, last = place(counter), value(counter), value(limit)
    if element is None or first is None or last is None:
      continue
    after = _value(computations, inside, root.operands[element], start)
    if after is None or after == first:
      continue
    step = after - first
    distance = {
      "LT": last - first,
      "LE": last - first + 1,
      "GT": last - first,
      "GE": last - first - 1,
      "NE": last - first,
    }.get(sign)
    if distance is None:
      return None
    return max(0, math.ceil(distance / step))
  return None


# FLOPs.


def _flops(one, body) -> Part:
  """Of a product, a convolution, or a library's call."""
  shapes = [body.instructions[x].shape for x in one.operands]
  if one.opcode == "dot":
    contracted = _numbers(one.attributes, "lhs_contracting_dims")
    depth = math.prod(shapes[0][0].dims[i] for i in contracted)
    flops = 2.0 * math.prod(one.shape[0].dims) * depth
  elif one.opcode == "convolution":
    flops = _convolution(
      shapes[0][0].dims, shapes[1][0].dims, one.shape[0].dims, one.attributes
    )
  else:
    flops = _library_call(one, shapes)
  precision = re.search(r"operand_precision=\{([\w,]*)\}", one.attributes)
  float32 = all(s[0].dtype in ("f32", "f64") for s in shapes[:2] if s)
  passes = 1
  if precision and float32:
    passes = {"highest": 6, "high": 3}.get(precision[1].split(",")[0], 1)
  return Part(flops, flops * passes)


def _convolution(lhs, rhs, out, attributes):
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
  left, right, to = labels[1], labels[2], labels[3]
  groups = re.search(r"batch_group_count=(\d+)", attributes)
  window = re.search(r"window=\{([^}]*)\}", attributes)
  window = dict(x.split("=") for x in window[1].split()) if window else {}
  spatial = sorted(set(to) - set("bf"))
  get = lambda key, default: (
    window[key].split("x") if key in window else [default] * len(spatial)
  )
  flops = 2.0 * lhs[left.index("b")] / (int(groups[1]) if groups else 1)
  flops *= rhs[right.index("i")] * rhs[right.index("o")]
  for d, pad, stride, lhs_dilate, rhs_dilate in zip(
    spatial,
    get("pad", "0_0"),
    get("stride", "1"),
    get("lhs_dilate", "1"),
    get("rhs_dilate", "1"),
  ):
    flops *= _pairs(
      lhs[left.index(d)],
      rhs[right.index(d)],
      out[to.index(d)],
      int(pad.split("_")[0]),
      int(stride),
      int(lhs_dilate),
      int(rhs_dilate),
    )
  return flops


@functools.lru_cache(maxsize=4096)
def _pairs(size, taps, outputs, pad, stride, lhs_dilate, rhs_dilate):
  """How many (output, tap) pairs of one dimension meet an element of the input."""
  at = np.arange(outputs)[:, None] * stride + np.arange(taps) * rhs_dilate - pad
  inside = (at >= 0) & (at <= (size - 1) * lhs_dilate) & (at % lhs_dilate == 0)
  return int(inside.sum())


def _library_call(one, shapes):
  """Products and convolutions that a program hands to a library or a kernel."""
  if kernel := re.match(r"splash_mha_(fwd|dkv)", one.name):  # see models/attention.py
    queries, keys = [s[0].dims for s in shapes if len(s[0].dims) == 4][:2]
    products = {"fwd": 2, "dkv": 5}[kernel[1]]  # causal ones as if none were skipped
    return 2.0 * products * math.prod(queries) * keys[-1]
  target = _target(one)
  out = one.shape[0].dims if one.shape else ()
  if "gemm" in target or "matmul" in target:
    numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    dims = [int(x) for x in re.findall(r"\d+", numbers[1])] if numbers else [-1]
    return 2.0 * math.prod(out) * math.prod(shapes[0][0].dims[i] for i in dims)
  if "conv" in target and "dim_labels=" in one.attributes:
    # The labels and the window are those of the forward convolution.
    image, kernel, result = shapes[0][0].dims, shapes[1][0].dims, out
    if "BackwardInput" in target:
      image, kernel, result = out, shapes[1][0].dims, shapes[0][0].dims
    elif "BackwardFilter" in target:
      image, kernel, result = shapes[0][0].dims, out, shapes[1][0].dims
    return _convolution(image, kernel, result, one.attributes)
  return 0.0


# Groups of devices.


def _group(attributes) -> tuple[int, ...]:
  """The devices of the first group of a collective, numbered as in the mesh."""
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
    return int(pairs[1]), int(pairs[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
    return tuple(int(n) for n in listed[1].split(",") if n)
  iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if found := re.search(iota, attributes):
    shape, over = ([int(n) for n in found[i].split(",")] for i in (1, 2))
    ids = np.arange(math.prod(over)).reshape(over)
    if found[3]:
      ids = ids.transpose([int(n) for n in found[3].split(",")])
    return tuple(ids.reshape(shape)[0].tolist())
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
    axes = re.findall(r"'?(\w+)'?=(\d+)", found[1])
    sizes = [int(n) for _, n in axes]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    wanted = set(re.findall(r"'(\w+)'", found[2]))
    return tuple(
      ids[tuple(slice(None) if a in wanted else 0 for a, _ in axes)].ravel().tolist()
    )
  return ()


def summary(collectives) -> dict[str, dict]:
  """By kind: how many a step, their bytes, and the bytes a device has to send."""
  kinds = {}
  for one in collectives:
    kind = kinds.setdefault(one.kind, {"count": 0, "bytes": 0, "sent_bytes": 0.0})
    kind["count"] += one.count
    kind["bytes"] += one.count * one.bytes
    kind["sent_bytes"] += one.count * one.wire
  return kinds
