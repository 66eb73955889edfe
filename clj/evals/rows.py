"""Rows of features over the devices of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def context_mesh() -> Mesh:
  """The mesh of the context (`jax.set_mesh`), or one of a single device."""
  mesh = jax.sharding.get_mesh()
  if not mesh.empty:
    return mesh
  axis_types = (AxisType.Auto, AxisType.Auto)
  return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types, devices=jax.devices()[:1])


def shard_rows(x, mesh: Mesh, multiple: int = 1, fill=0) -> jax.Array:
  """Splits the rows of `x` over all devices, filled up to `multiple` rows on each.

  A NumPy array has all rows, the same on every process. JAX arrays stay on the devices.
  """
  rows = mesh.size * multiple
  pad = [(0, -len(x) % rows)] + [(0, 0)] * (x.ndim - 1)
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  if isinstance(x, jax.Array):
    return jax.jit(
      lambda x: jnp.pad(x, pad, constant_values=fill), out_shardings=sharding
    )(x)
  x = np.pad(np.asarray(x), pad, constant_values=fill)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
