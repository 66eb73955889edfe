"""Chips: what is published of them, which of them a plan is for, and their links."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time

import numpy as np

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
# What JAX calls the devices of a TPU.
KINDS = {
  "TPU v2": "v2",
  "TPU v3": "v3",
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
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
    self.chip = _gpu(self.kind)
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


def _gpu(kind: str) -> Chip | None:
  return next((chip for name, chip in GPUS.items() if name in kind), None)


def peak_flops(device) -> float | None:
  """The most FLOPs a second of a JAX device; None where they are not known.

  Of TPUs and GPUs the published peak of bfloat16 products (`TPUS`, `GPUS`); of a CPU
  what a product of float32 matrices reaches here, shared among its devices: measured
  once, in about a third of a second.
  """
  if device.platform == "cpu":
    return _measured()
  if device.platform == "tpu":
    chip = TPUS.get(KINDS.get(device.device_kind))
    return chip.flops / chip.devices if chip else None
  chip = _gpu(device.device_kind)
  return chip.flops if chip else None


@functools.cache
def _measured(side: int = 1024, tries: int = 5) -> float:
  """FLOPs a second of one of the CPU's devices: the best of a few products.

  One device uses all cores while the others rest, and is one of them in a step.
  """
  import jax

  from clj import sharding

  seconds = []
  with sharding.on_one_device():
    a = jax.device_put(np.ones((side, side), np.float32))
    product = jax.jit(lambda a: a @ a).lower(a).compile()
    for _ in range(tries + 1):  # the first one starts threads
      began = time.perf_counter()
      product(a).block_until_ready()
      seconds.append(time.perf_counter() - began)
  return 2 * side**3 / min(seconds) / jax.local_device_count()


def quiet_compiler():
  """Lets the TPU compiler look for no TPU, and run beside others of its kind."""
  os.environ.pop("XLA_FLAGS", None)  # it ends on those of other compilers
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
