"""The train step of a config, compiled for devices that need not be here."""

import math
import re
import time
from typing import Any, NamedTuple

import jax

from clj import sharding, train
from clj.data.dataset import expected_spec
from clj.planning import hlo
from clj.planning.chips import Topology

# The scopes of the train step and of the losses; what is in none is `hlo.OTHER`.
SCOPES = ("augmentation", "towers", "loss", "optimiser")


def batch_shapes(config: dict, mesh) -> dict:
  """What the data pipeline gives, by key, without asking the data.

  See `expected_spec`.
  """
  where = sharding.batch_sharding(mesh)
  return {
    key: jax.ShapeDtypeStruct(
      (config["batch_size"], *row.shape), row.dtype, sharding=where
    )
    for key, row in expected_spec(config["data"]).items()
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
  mesh = sharding.of_config(config["mesh"], topology.devices)
  sharding.check_batch_size(config["batch_size"], mesh)
  with jax.set_mesh(mesh):
    batch = batch_shapes(config, mesh)
    program = train.build(
      batch,
      mesh,
      augment=config["data"].get("augment", {}),
      rules=config["mesh"].get("rules", ()),
      **{k: config[k] for k in ("seed", "batch_size", "total_steps")},
      **{k: config[k] for k in ("method", "model", "optim")},
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

  Bytes, FLOPs and seconds are those of one device in one step. "parts" has them by
  `SCOPES`; they add up to those of the step.
  """
  compiled = step.compiled
  found = {
    "topology": topology.name,
    "kind": topology.kind,
    "chips": topology.chips,
    "devices": len(topology.devices),
    "hosts": topology.hosts,
    "mesh": dict(step.mesh.shape),
    "batch_size": config["batch_size"],
    "batch_per_device": config["batch_size"] // len(topology.devices),
    "compile_s": round(step.seconds, 1),
    "memory": _memory(step),
    "hbm": topology.hbm,
  }
  if isinstance(compiled, str):
    return found | {"fits": False, "needs": needed(compiled), "why": _why(compiled)}
  total = found["memory"]["total"]
  cost = hlo.analyse(compiled.as_text(), SCOPES)
  order = list(step.mesh.devices.flat)
  of_part = lambda name: [one for one in cost.collectives if one.part == name]
  parts = {
    name: _examined(part, of_part(name), topology, order)
    for name, part in cost.parts.items()
  }
  found |= {
    "fits": total <= topology.hbm,
    "needs": total,
    **_examined(cost, cost.collectives, topology, order),
    "recomputed_flops": cost.recomputed,
    "parts": parts,
    "loops": [trips for _, trips in cost.loops],
  }
  if topology.chip is None:
    return found
  times = found["seconds"]
  best, worst = max(times.values()), sum(times.values())
  rate = config["batch_size"] / best
  return found | {
    "step_s": [best, worst],
    "images_per_s": [rate, config["batch_size"] / worst],
    "hours": [config["total_steps"] * s / 3600 for s in (best, worst)],
    "host_images_per_s": rate / topology.hosts,
    "peaks": topology.chip.source,
  }


def _memory(step: Step) -> dict[str, int]:
  """Bytes that one device holds; what the compiler adds, if it compiled."""
  held = lambda tree: sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
  )
  state = step.program.state
  memory = {
    "parameters": held(state.params),
    "optimiser": held(state.opt_state),
    "carried": held(state.extra),
    "batch": held(step.batch),
  }
  if isinstance(step.compiled, str):
    return memory
  size = step.compiled.memory_analysis()
  memory["temporaries"] = size.temp_size_in_bytes
  memory["program"] = size.generated_code_size_in_bytes
  total = size.argument_size_in_bytes + size.output_size_in_bytes
  total += size.temp_size_in_bytes + size.generated_code_size_in_bytes
  total -= size.alias_size_in_bytes
  memory["padding"] = total - sum(memory.values())
  memory["total"] = total
  return memory


def _examined(cost, collectives, topology: Topology, order) -> dict:
  """What a program or a part of it does, and the least time at the peaks.

  cost: `hlo.Cost` or `hlo.Part`. order: the devices in the order of the mesh.
  """
  found = {
    "flops": cost.flops,
    "hbm_bytes": cost.hbm_bytes,
    "collectives": hlo.summary(collectives),
  }
  if topology.chip is None:
    return found
  chip, share = topology.chip, topology.chip.devices
  wire = dict.fromkeys(found["collectives"], 0.0)
  for one in collectives:
    wire[one.kind] += one.count * topology.seconds(one, order)
  for kind, value in wire.items():
    found["collectives"][kind]["seconds"] = value
  times = {
    "compute": cost.passes / (chip.flops / share),
    "memory": cost.hbm_bytes / (chip.memory / share),
    "interconnect": sum(wire.values()),
  }
  return found | {"seconds": times, "bound": max(times, key=times.get)}


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
