"""One mesh, axes ("data", "fsdp"), and the rules that lay batches and states on it.

The batch is split over both axes. A parameter is split over "fsdp" by the first rule
that matches its name; by default the largest divisible axis of arrays above 4 MiB is.
With `fsdp=1` that is plain data parallelism: everything is replicated.
"""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clj.cli import UserError, check_keys

AXES = ("data", "fsdp")
SMALL = 4 * 2**20  # bytes; splitting less than this costs more latency than it saves


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """Builds the mesh; one of the two sizes may be -1: all remaining devices.

  Over several TPU slices the slow network between them is crossed along "data" only.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = {"data": data, "fsdp": fsdp}
  free = [axis for axis, size in shape.items() if size == -1]
  known = math.prod(size for size in shape.values() if size != -1)
  if len(free) > 1 or known < 1 or len(devices) % known:
    raise UserError(
      f"mesh data={data} fsdp={fsdp} does not divide {len(devices)} devices; "
      "use sizes whose product is that number, -1 for the rest"
    )
  for axis in free:
    shape[axis] = len(devices) // known
  if math.prod(shape.values()) != len(devices):
    raise UserError(
      f"mesh data={data} fsdp={fsdp} is for {math.prod(shape.values())} devices, "
      f"here are {len(devices)}; use data=-1 for all that remain"
    )
  where = lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id)
  slices = len({where(d)[0] for d in devices})
  if shape["data"] % slices:
    raise UserError(f"mesh data={shape['data']} does not divide over {slices} slices")
  # By process, so that each feeds one range of rows; on TPUs the chips of a host are
  # neighbours, and so are hosts that follow each other.
  grid = np.array(sorted(devices, key=where)).reshape(shape["data"], shape["fsdp"])
  return Mesh(grid, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def of_config(section: dict, devices=None) -> Mesh:
  """The mesh of a config's section `mesh`, which may have `rules` for the state too."""
  check_keys(section, ("data", "fsdp", "rules"), "mesh")
  return make_mesh(section["data"], section["fsdp"], devices)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over every device."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def compiler_options(mesh: Mesh) -> dict | None:
  """What XLA is told when it compiles a step for this mesh.

  On a CPU split into devices it is to order operations for memory's sake. Its default
  order has as many ready as it can, and devices then wait for each other in turn.
  """
  if mesh.devices.flat[0].platform != "cpu" or mesh.size == 1:
    return None
  return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def name(path) -> str:
  """The "/"-joined name of a leaf, from a key path of `jax.tree_util`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(leaf, leaf_name: str, fsdp: int, rules: Sequence = ()) -> PartitionSpec:
  """The PartitionSpec of one leaf: first matching rule, else the default."""
  for pattern, partition in rules:
    if re.search(pattern, leaf_name):
      return PartitionSpec(*partition)
  # A typed random key is a scalar of a few bytes.
  if fsdp == 1 or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return PartitionSpec()
  if math.prod(leaf.shape) * leaf.dtype.itemsize <= SMALL:
    return PartitionSpec()
  sizes = [n if n % fsdp == 0 else 0 for n in leaf.shape]
  if not any(sizes):
    return PartitionSpec()
  largest = int(np.argmax(sizes))
  return PartitionSpec(*[None] * largest, "fsdp")


def state_shardings(state, mesh: Mesh, rules: Sequence = ()):
  """A NamedSharding for every leaf of `state` (arrays or their shapes).

  rules: ordered pairs (regex on the leaf's name, tuple of axis names or None), such as
    ("params/head/.*kernel", (None, "fsdp")).
  """
  fsdp = mesh.shape["fsdp"]
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(mesh, spec(leaf, name(path), fsdp, rules)), state
  )


@jax.custom_vjp
def _gather(x):
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


# The gradient is not gathered: it is summed, and each device keeps its part.
_gather.defvjp(lambda x: (_gather(x), None), lambda _, g: (g,))


def is_split() -> bool:
  """Whether the mesh of the context splits parameters."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.shape.get("fsdp", 1) > 1


def whole(tree):
  """Gathers what is split over "fsdp", for it is about to be used.

  Without it the compiler is free to move activations instead of parameters. Layers that
  a loop goes through, stacked in "blocks", are left: the loop gathers each in its turn
  (`whole_layer`), so that one at a time is whole.
  """
  if not is_split():
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if "/blocks/" in f"/{name(path)}" else _gather_array(x), tree
  )


def whole_layer(params):
  """The same for one layer, inside the loop."""
  return jax.tree.map(_gather_array, params)


def _gather_array(x):
  is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return x if is_key else _gather(x)


def platform() -> str:
  """Of the devices that a program is traced for: "tpu", "gpu" or "cpu".

  Those of the mesh of the context, which need not be here; without one, JAX's own.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def by_rows(function, *arrays):
  """`function(*arrays)`, run by each device on its own rows.

  For what the compiler cannot split: it would gather the rows of all devices. What the
  devices do not divide, such as a single row, is whole on each.

  arrays: trees of arrays with the same number of rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(
    axis
    for axis, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == AxisType.Auto
  )
  devices = math.prod(mesh.shape[axis] for axis in axes)
  if devices == 1:
    return function(*arrays)
  rows = len(jax.tree.leaves(arrays)[0])
  spec = PartitionSpec(axes) if rows % devices == 0 else PartitionSpec()
  # Not checked: kernels do not say over which axes their results vary.
  split = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
  return split(*arrays)


def check_batch_size(batch_size: int, mesh: Mesh):
  if batch_size < 1 or batch_size % mesh.size:
    down, up = batch_size // mesh.size * mesh.size, -(-batch_size // mesh.size)
    near = max(down, mesh.size), max(up, 1) * mesh.size
    raise UserError(
      f"batch_size {batch_size} does not divide over {mesh.size} devices; "
      f"use {near[0]}" + (f" or {near[1]}" if near[1] != near[0] else "")
    )


def process_rows(batch_size: int, mesh: Mesh) -> tuple[int, int]:
  """The rows `(first, last + 1)` of the global batch that this process feeds."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  bounds = sorted((i.start or 0, i.stop or batch_size) for (i,) in indices.values())
  for (_, stop), (start, _) in zip(bounds, bounds[1:]):
    if stop != start:
      raise UserError(
        f"this process owns the separate rows {bounds} of a batch; order the mesh's "
        "devices by process"
      )
  return bounds[0][0], bounds[-1][1]


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a batch -> global arrays, split over every device."""
  sharding = batch_sharding(mesh)
  return {
    key: jax.make_array_from_process_local_data(sharding, rows)
    for key, rows in batch.items()
  }


def to_all(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Arrays that every process has, whole on every device."""
  whole = replicated(mesh)
  return {
    key: jax.make_array_from_callback(array.shape, whole, lambda i, a=array: a[i])
    for key, array in arrays.items()
  }


def on_one_device():
  """A context for what this process does by itself, on one device of its own."""
  return jax.set_mesh(make_mesh(devices=jax.local_devices()[:1]))
