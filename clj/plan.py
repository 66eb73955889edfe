"""What a run will need and how fast it can be, before a TPU is paid for.

    python -m clj.plan --config=configs/simclr.py:imagenet_r50 --topology=v5e:8x8
      [--config.key=value ...] [--json] [--sweep]

The real train step of the config is compiled for every device of the topology, from
shapes alone; no TPU is needed, only its compiler (pip install libtpu). What one device
holds, computes, moves in its memory and sends is then read off the compiled program
(`clj.planning.hlo`) and set against the published peaks of the hardware. The times are
bounds, not forecasts: nothing runs at its peak.

--topology: GENERATION:SHAPE in chips, such as v5e:16x16, v4:4x4x4, or 8xv5e:16x16 for
  eight slices; several, with commas, give a table; "local" is the GPUs or the CPU here.
--sweep: from 8 to 2,048 chips of the generation at the batch per device that the config
  has on --topology (weak scaling).
"""

import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
import sys
import time
from typing import Any, NamedTuple

from clj import cli
from clj.cli import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of one chip; sources beside the table.

  flops: bfloat16 products, 1/s. hbm: GiB that its programs may use, as the compiler
  says it. memory: bytes/s of that memory. link: bytes/s one way on one of its links to
  other chips. links: how many it has. wraps: an axis of a slice is a ring if its size
  is a multiple of this. between: bytes/s one way of a chip to other slices, None where
  that is not published. devices: that JAX sees in it. options: of the compiler.
  """

  flops: float
  hbm: float
  memory: float
  link: float
  links: int
  wraps: int
  source: str
  between: float | None = None
  devices: int = 1
  options: tuple = ()


_DOCS = "https://cloud.google.com/tpu/docs/"
_CACM = "Jouppi et al., CACM 63(7) 2020, A Domain-Specific Supercomputer"
# One way: half of the "bidirectional ICI bandwidth per chip" of newer pages, all of the
# older "interchip interconnect BW", divided by the ports of a chip. Between slices: the
# "data center network bandwidth" a chip.
TPUS = {
  "v2": Chip(46e12, 2 * 7.48, 700e9, 62e9, 4, 16, _CACM, devices=2),
  "v3": Chip(
    123e12, 2 * 15.48, 900e9, 82e9, 4, 32, _DOCS + "v3; links: " + _CACM, devices=2
  ),
  "v4": Chip(
    275e12,
    30.75,
    1200e9,
    50e9,
    6,
    4,
    _DOCS + "v4; links: 2400 Gbps a chip, " + _DOCS + "v5p",
    options=(
      ("chip_config_name", "megacore"),
      ("chips_per_host_bounds", (2, 2, 1)),
    ),
  ),
  "v5e": Chip(197e12, 15.75, 819e9, 50e9, 4, 16, _DOCS + "v5e", between=3.125e9),
  "v5p": Chip(459e12, 95.73, 2765e9, 100e9, 6, 4, _DOCS + "v5p", between=6.25e9),
  "v6e": Chip(918e12, 31.24, 1640e9, 100e9, 4, 16, _DOCS + "v6e", between=12.5e9),
}
# Seconds a hop takes at least: https://jax-ml.github.io/scaling-book/sharding/
HOP = 1e-6

# Dense bfloat16, memory bandwidth, NVLink one way; NVIDIA's data sheets of each.
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
GPUS = {
  "V100": Chip(125e12, 0, 900e9, 150e9, 1, 1, _NVIDIA + "v100 (float16)"),
  "A100": Chip(312e12, 0, 2039e9, 300e9, 1, 1, _NVIDIA + "a100"),
  "H100": Chip(989e12, 0, 3350e9, 450e9, 1, 1, _NVIDIA + "h100"),
  "H200": Chip(989e12, 0, 4800e9, 450e9, 1, 1, _NVIDIA + "h200"),
  "B200": Chip(2250e12, 0, 8000e9, 900e9, 1, 1, _NVIDIA + "dgx-b200"),
}
# Shapes of 8 to 2,048 chips; more than a pod are several slices.
SIZES = {
  2: ("2x4", "4x8", "8x16", "16x16"),
  3: ("2x2x2", "2x4x4", "4x4x8", "8x8x8", "8x16x16"),
}


class Topology:
  """Devices to compile for, and what is known of them."""

  def __init__(self, name: str):
    self.name = name
    if name == "local":
      self._local()
    else:
      self._tpu(name)

  def _tpu(self, name):
    from jax.experimental import topologies

    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+?):(\d+(?:x\d+)*)", name)
    if not found or found[2] not in TPUS:
      raise UserError(
        f"topology {name!r} is not GENERATION:SHAPE with a generation of "
        f"{', '.join(TPUS)}, such as v5e:16x16, v4:4x4x4 or 8xv5e:16x16; or local"
      )
    if importlib.util.find_spec("libtpu") is None:
      raise UserError(
        f"compiling for {name} needs the TPU compiler (no TPU): pip install libtpu"
      )
    self.slices, self.generation = int(found[1] or 1), found[2]
    self.chip = TPUS[found[2]]
    self.shape = tuple(int(n) for n in found[3].split("x"))
    if max(self.shape) == 1:  # one chip is not one host
      options = {"chips_per_host_bounds": (1, 1, 1)}
    else:
      options = dict(self.chip.options)
    if self.slices > 1:
      options["num_slices"] = self.slices
    try:
      self.devices = topologies.get_topology_desc(
        topology_name=f"{found[2]}:{found[3]}", platform="tpu", **options
      ).devices
    except Exception as error:
      line = str(error).strip().splitlines()[0]
      raise UserError(f"the TPU compiler refuses topology {name}: {line}") from None
    self.hbm = self.chip.hbm * GIB / self.chip.devices
    self.chips = self.slices * math.prod(self.shape)
    self.hosts = len({d.process_index for d in self.devices})
    self.kind = f"TPU {found[2]}"

  def _local(self):
    import jax

    self.devices = jax.devices()
    self.kind = self.devices[0].device_kind
    self.generation, self.slices, self.shape = self.devices[0].platform, 1, ()
    self.chip = next((c for k, c in GPUS.items() if k in self.kind), None)
    self.chips, self.hosts = len(self.devices), jax.process_count()
    stats = self.devices[0].memory_stats() or {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    self.hbm = stats.get("bytes_limit", memory / len(self.devices))

  def seconds(self, one, order) -> float:
    """The least time of one collective on the links of the chips.

    order: the devices of the mesh in order. In a slice every link carries its share in
    both directions; a chip at the edge of a mesh that is no torus has the fewest. Every
    hop takes `HOP`. Between slices, each chip sends its part of the whole.
    """
    if one.group < 2 or self.chip is None:
      return 0.0
    devices = [order[i] for i in one.first]
    both = 2 if one.kind == "all-reduce" else 1
    if not self.shape:  # GPUs: every device has its links to all others
      return one.wire / (self.chip.link * self.chip.links)
    slices = {getattr(d, "slice_index", None) or 0 for d in devices}
    chips = {(getattr(d, "slice_index", None) or 0, *d.coords) for d in devices}
    share = self.chip.devices * len(chips) / len(devices)  # groups that use one chip
    inside = len(chips) // len(slices)
    links = hops = 0
    for axis, size in enumerate(self.shape):
      extent = len({d.coords[axis] for d in devices})
      if extent > 1:
        ring = extent == size and size % self.chip.wraps == 0
        links += 2 if ring else 1
        hops += extent // 2 if ring else extent - 1
    seconds = 0.0
    if inside > 1 and links:
      if one.kind == "collective-permute":
        sent = one.bytes
      else:
        sent = both * one.bytes * (inside - 1) / inside
      seconds = max(share * sent / (links * self.chip.link), both * hops * HOP)
    if len(slices) > 1 and self.chip.between:
      sent = both * one.bytes * (len(slices) - 1) / len(slices) / inside
      seconds += share * sent / self.chip.between
    return seconds


def batch_shapes(config: dict, mesh) -> dict:
  """What the data pipeline gives, by key, without asking the data.

  Embedded pictures and those of `memory_size` come whole, others as crops; all with a
  label, which is -1 where there is none.
  """
  import jax
  import numpy as np

  from clj import sharding
  from clj.data import sources

  data = config["data"]
  if data["source"].partition("/")[0] == "shapes":
    source = sources.open_source(data["source"], data["train_split"])
    pictures = (1, *source.arrays["image"].shape[1:])
  elif side := data.get("memory_size"):
    pictures = (1, side, side, 3)
  else:
    pictures = (data["views"], data["size"], data["size"], 3)
  shapes = {
    "index": ((), np.int32),
    "image": (pictures, np.uint8),
    "label": ((), np.int32),
  }
  if text := data.get("text"):
    shapes["text"] = (text["length"],), np.int32
    shapes["text_mask"] = (text["length"],), np.bool_
  where = sharding.batch_sharding(mesh)
  return {
    key: jax.ShapeDtypeStruct((config["batch_size"], *shape), dtype, sharding=where)
    for key, (shape, dtype) in shapes.items()
  }


class Step(NamedTuple):
  """A train step, compiled for a topology.

  batch: shapes by key. compiled: the program, or where it does not fit the compiler's
  complaint, a string. seconds: that compiling took.
  """

  program: Any
  batch: dict
  mesh: Any
  compiled: Any
  seconds: float


def compile_step(config: dict, topology: Topology) -> Step:
  """Compiles the train step of a config, from shapes alone."""
  import jax

  from clj import sharding, train

  mesh = sharding.of_config(config["mesh"], topology.devices)
  sharding.check_batch_size(config["batch_size"], mesh)
  sections = ("method", "model", "data", "optim")
  numbers = ("seed", "batch_size", "total_steps")
  with jax.set_mesh(mesh):
    batch = batch_shapes(config, mesh)
    program = train.build(
      batch,
      mesh,
      **{k: config[k] for k in sections + numbers},
      rules=config["mesh"].get("rules", ()),
    )
    lowered = program.step.lower(program.state, batch)
    start = time.monotonic()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      compiled = str(error)
  return Step(program, batch, mesh, compiled, time.monotonic() - start)


def plan(config: dict, topology: Topology) -> dict:
  """Compiles and examines the train step of a config."""
  return examine(config, topology, compile_step(config, topology))


def examine(config: dict, topology: Topology, step: Step) -> dict:
  """Counts and compares: everything that is printed, by name.

  Bytes, FLOPs and seconds are those of one device in one step.
  """
  import jax

  from clj.planning import hlo

  compiled, mesh, state = step.compiled, step.mesh, step.program.state
  held = lambda tree: sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
  )
  found = {
    "topology": topology.name,
    "kind": topology.kind,
    "chips": topology.chips,
    "devices": len(topology.devices),
    "hosts": topology.hosts,
    "mesh": dict(mesh.shape),
    "batch_size": config["batch_size"],
    "batch_per_device": config["batch_size"] // len(topology.devices),
    "compile_s": round(step.seconds, 1),
    "memory": {
      "parameters": held(state.params),
      "optimiser": held(state.opt_state),
      "carried": held(state.extra),
      "batch": held(step.batch),
    },
    "hbm": topology.hbm,
  }
  if isinstance(compiled, str):
    return found | {"fits": False, "needs": needed(compiled), "why": _why(compiled)}
  memory, size = found["memory"], compiled.memory_analysis()
  memory["temporaries"] = size.temp_size_in_bytes
  memory["program"] = size.generated_code_size_in_bytes
  total = size.argument_size_in_bytes + size.output_size_in_bytes
  total += size.temp_size_in_bytes + size.generated_code_size_in_bytes
  total -= size.alias_size_in_bytes
  memory["padding"] = total - sum(memory.values())
  memory["total"] = total
  cost = hlo.analyse(compiled.as_text())
  order = list(mesh.devices.flat)
  found |= {
    "fits": total <= topology.hbm,
    "needs": total,
    "flops": cost.flops,
    "hbm_bytes": cost.hbm_bytes,
    "collectives": hlo.summary(cost.collectives),
    "loops": [trips for _, trips in cost.loops],
  }
  if topology.chip is None:
    return found
  chip, share = topology.chip, topology.chip.devices
  wire = {}
  for one in cost.collectives:
    time_of = one.count * topology.seconds(one, order)
    wire[one.kind] = wire.get(one.kind, 0.0) + time_of
  for kind, value in wire.items():
    found["collectives"][kind]["seconds"] = value
  times = {
    "compute": cost.passes / (chip.flops / share),
    "memory": cost.hbm_bytes / (chip.memory / share),
    "interconnect": sum(wire.values()),
  }
  best, worst = max(times.values()), sum(times.values())
  rate = config["batch_size"] / best
  return found | {
    "seconds": times,
    "bound": max(times, key=times.get),
    "step_s": [best, worst],
    "images_per_s": [rate, config["batch_size"] / worst],
    "hours": [config["total_steps"] * s / 3600 for s in (best, worst)],
    "host_images_per_s": rate / topology.hosts,
    "peaks": chip.source,
  }


def needed(complaint: str) -> float | None:
  """Bytes that the compiler says it needs, from its complaint."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
  for pattern in (
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm",
    r"memory required[^(]*\(([\d.]+)([KMGT]?)\)",
  ):
    if found := re.search(pattern, complaint):
      return float(found[1]) * units[found[2]]
  return None


def _why(complaint: str) -> str:
  lines = [line.strip() for line in complaint.splitlines() if line.strip()]
  told = [line for line in lines if "hbm" in line.lower() or "memory" in line.lower()]
  return (told or lines)[0][:200]


# What would make it fit.


def changes(config: dict, devices: int):
  """(what to add to the command, changed config): what saves memory, best first."""
  for section in ("method", "model"):
    for path, value in _keys(config[section]):
      chunk = config["batch_size"] // 8
      if path[-1] == "micro_batch" and not value and chunk and chunk % devices == 0:
        yield _changed(config, (section, *path), chunk)
      if path[-1] == "remat" and value is not True:
        yield _changed(config, (section, *path), True)
  if config["mesh"]["fsdp"] == 1:
    yield _changed(config, ("mesh", "fsdp"), devices)


def _keys(tree, path=()):
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _keys(value, (*path, key))
    else:
      yield (*path, key), value


def _changed(config, path, value):
  config = copy.deepcopy(config)
  inner = config
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  return f"--config.{'.'.join(path)}={value}", config


def make_fit(config: dict, topology: Topology, tell) -> list[tuple[str, dict]]:
  """Compiles with what saves memory until the step fits: [(flags, plan)], in order."""
  tried = []
  together, everything = [], config
  for flag, changed in changes(config, len(topology.devices)):
    tell(f"trying {flag}")
    tried.append((flag, plan(changed, topology)))
    if tried[-1][1]["fits"]:
      return tried
    together.append(flag)
  if len(together) > 1:
    for flag in together:
      path, value = flag.removeprefix("--config.").split("=")
      value = True if value == "True" else int(value)
      everything = _changed(everything, path.split("."), value)[1]
    tell(f"trying {' '.join(together)}")
    tried.append((" ".join(together), plan(everything, topology)))
    if tried[-1][1]["fits"]:
      return tried
  rows = config["batch_size"] // 2
  while rows >= len(topology.devices) and rows % len(topology.devices) == 0:
    flag, changed = _changed(config, ("batch_size",), rows)
    tell(f"trying {flag}")
    tried.append((flag, plan(changed, topology)))
    if tried[-1][1]["fits"]:
      break
    rows //= 2
  return tried


# Output.


def size(count: float) -> str:
  for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
    if count >= scale:
      return f"{count / scale:.2f} {unit}"
  return f"{count / 1024:.1f} KiB"


def _span(pair, form="{:.3g}") -> str:
  low, high = (form.format(x) for x in sorted(pair))
  return low if low == high else f"{low} to {high}"


def describe(found: dict, name: str) -> str:
  """A plan as text for people."""
  from clj.runs import log

  device = "chip"
  if found["devices"] != found["chips"]:
    device = "device (one of the two cores of a chip)"
  elif not found["kind"].startswith("TPU"):
    device = "device"
  mesh = " x ".join(f"{k} {v}" for k, v in found["mesh"].items())
  lines = [
    f"{name} on {found['topology']}: {found['chips']} chips of {found['kind']}, "
    f"{found['devices']} devices, {found['hosts']} hosts, mesh {mesh}",
    f"batch {found['batch_size']}, {found['batch_per_device']} a {device}; compiled in "
    f"{found['compile_s']:.0f} s",
    "",
  ]
  names = {
    "parameters": "parameters",
    "optimiser": "optimiser state",
    "carried": "carried (statistics, teacher, queue)",
    "batch": "batch",
    "temporaries": "activations and other temporaries",
    "program": "program",
    "padding": "padding of tiles, results",
    "total": "total",
  }
  rows = [(names[k], size(v)) for k, v in found["memory"].items()]
  share = ""
  if found["needs"]:
    share = f": {100 * found['needs'] / found['hbm']:.0f} % of {size(found['hbm'])}"
  verdict = "fits" if found["fits"] else "DOES NOT FIT"
  lines.append(log.table(rows, (f"memory of a {device}", "")))
  lines.append(f"{verdict}{share}")
  if not found["fits"]:
    lines.append(found.get("why", ""))
  if "flops" not in found:
    return "\n".join(lines)
  lines += [
    "",
    f"FLOPs {found['flops']:.4g}, memory traffic {size(found['hbm_bytes'])} a step and "
    f"{device}",
  ]
  rows = [
    (
      kind,
      one["count"],
      size(one["bytes"]),
      size(one["sent_bytes"]),
      f"{1e3 * one['seconds']:.2f} ms" if "seconds" in one else "",
    )
    for kind, one in found["collectives"].items()
  ]
  head = ("collectives a step", "count", "bytes", "sent at least", "time at least")
  lines += ["", log.table(rows, head)]
  if None in found["loops"]:
    lines.append("a loop has no trip count in the program: its body counts once")
  if "seconds" not in found:
    lines.append(f"no peaks are known of {found['kind']}: no times")
    return "\n".join(lines)
  times = found["seconds"]
  lines += [
    "",
    "a step at the peaks: "
    + ", ".join(f"{k} {1e3 * v:.2f} ms" for k, v in times.items())
    + f"; bound by {found['bound']}",
    f"images/s {_span(found['images_per_s'], '{:,.0f}')}, hours of the recipe "
    f"{_span(found['hours'])} (the three overlapped, and one after the other)",
    f"the input pipeline must give {found['images_per_s'][0]:,.0f} images/s, "
    f"{found['host_images_per_s']:,.0f} a host",
    f"peaks: {found['peaks']}",
  ]
  return "\n".join(lines)


def table(plans: list[dict]) -> str:
  """Plans side by side, in Markdown."""
  head = (
    "topology",
    "devices",
    "batch a device",
    "HBM a device",
    "of",
    "FLOPs a device",
    "compute, memory, interconnect (ms)",
    "bound",
    "images/s at most",
    "hours at least",
    "compiled in",
  )
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for one in plans:
    cells = [one["topology"], one["devices"], one["batch_per_device"]]
    cells[1] = f"{one['devices']}{' cores' if one['devices'] != one['chips'] else ''}"
    cells += [size(one["needs"]) if one["needs"] else "?", size(one["hbm"])]
    if "seconds" in one:
      cells += [
        f"{one['flops']:.3g}",
        ", ".join(f"{1e3 * s:.1f}" for s in one["seconds"].values()),
        one["bound"],
        f"{one['images_per_s'][0]:,.0f}",
        f"{one['hours'][0]:.2g}",
      ]
    else:
      cells += ["", "", "fits" if one["fits"] else "does not fit", "", ""]
    cells.append(f"{one['compile_s']:.0f} s")
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines)


def sizes(topology: Topology) -> list[str]:
  """Topologies of one generation from 8 to 2,048 chips."""
  if topology.generation not in TPUS:
    raise UserError("--sweep needs a TPU generation, such as --topology=v5p:4x4x4")
  chip, name = topology.chip, topology.generation
  shapes = SIZES[chip.links // 2]
  names = [f"{name}:{shape}" for shape in shapes]
  pod = math.prod(map(int, shapes[-1].split("x")))
  if pod < 2048 and chip.between:
    names += [f"{n}x{name}:{shapes[-1]}" for n in (2, 2048 // pod)]
  return names


def main(argv=None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    return _main(argv)
  except Exception as error:
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(error, jax.errors.JaxRuntimeError):
      error = UserError(cli.one_line(error))
    return cli.failed(error, "--debug" in argv)


def _main(argv) -> int:
  parser = cli.parser("clj.plan", f"{__doc__}\n{cli.CONFIG_HELP}.")
  parser.add_argument("--topology", default="local", help="for what; see above")
  parser.add_argument("--json", action="store_true", help="one JSON object a line")
  parser.add_argument("--sweep", action="store_true", help="weak scaling, 8 to 2,048")
  parser.add_argument("--debug", action="store_true", help="tracebacks of all errors")
  arguments, rest = parser.parse_known_args(argv)
  config, name = cli.read_config(rest)
  prepare(arguments.topology, config["batch_size"])
  tell = lambda line: print(line, file=sys.stderr, flush=True)
  names = arguments.topology.split(",")
  if arguments.sweep:
    first = Topology(names[0])
    rows = config["batch_size"] // len(first.devices)
    names = sizes(first)
  plans = []
  for each in names:
    topology = Topology(each)
    if arguments.sweep:  # as many examples in all as the recipe has
      examples = config["total_steps"] * config["batch_size"]
      config["batch_size"] = rows * len(topology.devices)
      config["total_steps"] = max(1, examples // config["batch_size"])
    tell(f"compiling for {each}, {len(topology.devices)} devices")
    found = plan(config, topology)
    plans.append(found)
    if arguments.json:
      print(json.dumps({"config": name} | found), flush=True)
    elif len(names) == 1:
      print(describe(found, name), flush=True)
    if not found["fits"] and len(names) == 1:
      for flag, tried in make_fit(config, topology, tell):
        if arguments.json:
          print(json.dumps({"config": name, "change": flag} | tried), flush=True)
          continue
        verdict = "fits" if tried["fits"] else "does not fit"
        needs = size(tried["needs"]) if tried["needs"] else "?"
        print(f"with {flag}: {verdict}, {needs}", flush=True)
  if len(names) > 1 and not arguments.json:
    print(table(plans))
  return 0


def prepare(topology: str, batch_size: int):
  """Sets the environment that JAX reads when it is imported."""
  cli.quiet_libraries()
  if topology == "local":
    cli.split_cpu(batch_size)
    return
  os.environ["JAX_PLATFORMS"] = "cpu"  # what is compiled for is not here
  quiet_compiler()


def quiet_compiler():
  """Lets the TPU compiler look for no TPU, and run beside others of its kind."""
  os.environ.pop("XLA_FLAGS", None)  # it ends on those of other compilers
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


if __name__ == "__main__":
  sys.exit(main())
