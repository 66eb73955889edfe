"""What the TPU compiler says of the losses, without a TPU.

    python -m benchmarks.loss_tpu --topology=v5e:16x16 [--losses=clip,nt_xent]
      [--batches=32768,262144,1048576] [--forms=gather,ring,dense,row_block]

Compiles value and gradient, with those of scale and bias, for every device of the
topology (libtpu is needed, a TPU is not) and prints one JSON line each: temporaries in
HBM, FLOPs as the compiler counts them (a loop's body once), and the collectives with
the bytes of one execution on one device. "dense" is autodiff through the matrix of
logits, left to the partitioner; "row_block" is what PyTorch programs do: gather both
sides, and autodiff through a device's rows of logits. Where a form does not compile,
the line says why. On a machine with a GPU `benchmarks.loss` runs the losses themselves.
"""

import functools
import json
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clj import losses

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "topology to compile for")
_LOSSES = flags.DEFINE_list("losses", ["nt_xent", "clip", "siglip"], "which losses")
_BATCHES = flags.DEFINE_list("batches", ["32768", "262144", "1048576"], "pairs")
_FORMS = flags.DEFINE_list("forms", ["gather", "ring", "dense", "row_block"], "forms")
_WIDTH = flags.DEFINE_integer("width", 512, "width of the embeddings")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "operands")

AXES = ("data", "fsdp")
COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "collective-permute",
  "all-to-all",
)


def _product(x, y):
  return jnp.matmul(x, y.T, preferred_element_type=jnp.float32)


def _rows(s, positive):
  own = jnp.take_along_axis(s, positive[:, None], axis=1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(s, axis=1) - own)


def _dense(name, x, y, scale, bias, offset=0, columns=None):
  """The loss of the rows x, y against all columns, through the matrix of logits."""
  all_x, all_y = (x, y) if columns is None else columns
  n = x.shape[0]
  i = jnp.arange(n) + offset
  if name == "siglip":
    s = scale * _product(x, all_y) + bias
    sign = jnp.where(i[:, None] == jnp.arange(all_y.shape[0])[None, :], 1.0, -1.0)
    return -jnp.sum(jax.nn.log_sigmoid(sign * s)) / n
  if name == "clip":
    s, t = scale * _product(x, all_y), scale * _product(y, all_x)
    return (_rows(s, i) + _rows(t, i)) / 2
  m = all_x.shape[0]
  z, total = jnp.concatenate([all_x, all_y]), 0.0
  for rows, own, positive in (x, i, i + m), (y, i + m, i):
    s = scale * _product(rows, z)
    s = jnp.where(own[:, None] == jnp.arange(2 * m)[None, :], -jnp.inf, s)
    total += _rows(s, positive) / 2
  return total


def _form(name, form):
  if form in ("gather", "ring"):
    ring = form == "ring"
    return {
      "nt_xent": lambda x, y, s, b: losses.nt_xent(x, y, 1 / s, ring=ring),
      "clip": lambda x, y, s, b: losses.clip(x, y, s, ring=ring),
      "siglip": lambda x, y, s, b: losses.siglip(x, y, s, b, ring=ring),
    }[name]
  unit = losses.l2_normalize if name == "nt_xent" else lambda z: z
  if form == "dense":
    return lambda x, y, s, b: _dense(name, unit(x), unit(y), s, b)

  def local(x, y, scale, bias):
    x, y = unit(x), unit(y)
    columns = tuple(jax.lax.all_gather(z, AXES, tiled=True) for z in (x, y))
    offset = jax.lax.axis_index(AXES) * x.shape[0]
    return jax.lax.pmean(_dense(name, x, y, scale, bias, offset, columns), AXES)

  rows = P(AXES)
  return jax.shard_map(local, in_specs=(rows, rows, P(), P()), out_specs=P())


def _bytes(shape):
  """Bytes of an HLO shape, the sum over a tuple."""
  sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
  found = re.findall(r"\b(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", shape))
  return sum(
    sizes.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
    for dtype, dims in found
  )


def collectives(text):
  """Kind -> [count, bytes of the results], of a compiled program's text.

  An asynchronous collective appears in several computations: those of one kind, shape
  and place in the program count once. A collective in a loop counts once, not once a
  trip.
  """
  kinds, seen = {}, set()
  names = "|".join(COLLECTIVES)
  pattern = rf"= (\S.*?) ({names})(-start)?\((\S+?)\)(.*)"
  for shape, kind, _, operand, rest in re.findall(pattern, text):
    place = re.search(r'op_name="([^"]*)"', rest)
    key = kind, shape, place[1] if place else operand
    if kind == "collective-permute":
      key += (operand,)
    if key in seen:
      continue
    seen.add(key)
    count, size = kinds.get(kind, (0, 0))
    kinds[kind] = [count + 1, size + _bytes(shape)]
  return kinds


def compile_loss(name, form, batch, width, dtype, mesh):
  rows, copies = NamedSharding(mesh, P(AXES)), NamedSharding(mesh, P())
  z = jax.ShapeDtypeStruct((batch, width), dtype, sharding=rows)
  one = jax.ShapeDtypeStruct((), jnp.float32, sharding=copies)
  with jax.set_mesh(mesh):
    step = jax.jit(
      jax.value_and_grad(_form(name, form), (0, 1, 2, 3)),
      out_shardings=(copies, (rows, rows, copies, copies)),
    )
    return step.lower(z, z, one, one).compile()


def report(name, form, batch, width, dtype, mesh):
  record = {"loss": name, "form": form, "batch": batch, "width": width, "dtype": dtype}
  try:
    compiled = compile_loss(name, form, batch, width, jnp.dtype(dtype), mesh)
  except jax.errors.JaxRuntimeError as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    used = [line for line in lines if "Used" in line or "exceeded" in line]
    return record | {"error": (used or lines)[0][:200]}
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  return record | {
    "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 2),
    "flops": cost.get("flops"),
    "collectives": collectives(compiled.as_text()),
  }


def main(argv):
  del argv
  topology = topologies.get_topology_desc(_TOPOLOGY.value, platform="tpu")
  devices = np.array(topology.devices).reshape(-1, 1)
  mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)
  head = {"topology": _TOPOLOGY.value, "devices": devices.size}
  line = functools.partial(print, flush=True)
  for batch in map(int, _BATCHES.value):
    for name in _LOSSES.value:
      for form in _FORMS.value:
        record = report(name, form, batch, _WIDTH.value, _DTYPE.value, mesh)
        line(json.dumps(head | record))


if __name__ == "__main__":
  app.run(main)
