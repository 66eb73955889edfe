"""Convolution whose gradients are fast on every platform.

XLA's CPU backend computes the gradients of a convolution as exotic convolutions, on a
slow path: the weight gradient of a 3x3 convolution at 32 x 32 x 64 runs at a quarter of
the speed of the forward pass. Here, and only on CPU, the same sums are written as
matrix products: equal up to the order of float32 additions. Everywhere else the program
holds XLA's own gradients and nothing of this file (`lax.platform_dependent`).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

CHUNK = 1024  # output positions that are worked on at once: what fits a core's cache


def _conv(x, kernel, stride):
  size = kernel.shape[0]
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=(((size - 1) // 2, size // 2),) * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x, kernel, stride):
  """`[N, H, W, C]` by `[k, k, C, D]` -> `[N, ceil(H / stride), ceil(W / stride), D]`.

  Zero padding of `(k - 1) // 2` before and `k // 2` after, whatever the stride: what
  PyTorch's `padding=k // 2` is for odd k, and not TensorFlow's SAME, which shifts
  strided convolutions of even sizes by a pixel.
  """
  return _conv(x, kernel, stride)


def _conv_fwd(x, kernel, stride):
  return _conv(x, kernel, stride), (x, kernel)


def _conv_bwd(stride, saved, g):
  x, kernel = saved
  dx = lax.platform_dependent(
    kernel,
    g,
    cpu=partial(_input_gradient_cpu, shape=x.shape, stride=stride),
    default=partial(_input_gradient, shape=x.shape, stride=stride),
  )
  dkernel = lax.platform_dependent(
    x,
    g,
    cpu=lambda x, g: _weight_gradient_cpu(x, g, len(kernel), stride).astype(x.dtype),
    default=partial(_weight_gradient, size=kernel.shape[0], stride=stride),
  )
  return dx, dkernel


conv.defvjp(_conv_fwd, _conv_bwd)


def _input_gradient(kernel, g, *, shape, stride):
  x = jax.ShapeDtypeStruct(shape, g.dtype)
  (dx,) = jax.linear_transpose(lambda x: _conv(x, kernel, stride), x)(g)
  return dx


def _weight_gradient(x, g, *, size, stride):
  kernel = jax.ShapeDtypeStruct((size, size, x.shape[-1], g.shape[-1]), x.dtype)
  (dkernel,) = jax.linear_transpose(lambda kernel: _conv(x, kernel, stride), kernel)(g)
  return dkernel


def _input_gradient_cpu(kernel, g, *, shape, stride):
  """With stride 2, pixels of one parity see the same taps: four small convolutions.

  They are one 2x2 convolution of `g` with four times the outputs, the missing taps
  being zero, whose outputs are then laid out as 2x2 pixels.
  """
  n, height, width, channels = shape
  size = kernel.shape[0]
  if stride != 2 or size not in (1, 3) or height % 2 or width % 2:
    return _input_gradient(kernel, g, shape=shape, stride=stride)
  if size == 1:
    dx = jnp.einsum("nhwd,cd->nhwc", g, kernel[0, 0])
    return lax.pad(
      dx, jnp.zeros((), g.dtype), ((0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0))
    )
  # Pixel 2p + a takes tap i from g[p + (a + 1 - i) / 2]: an even one tap 1 at p, an odd
  # one tap 2 at p and tap 0 at p + 1.
  taps = {(0, 0): 1, (1, 0): 2, (1, 1): 0}  # (parity, offset) -> tap
  zero = jnp.zeros_like(kernel[0, 0])
  phases = jnp.stack(
    [
      kernel[taps[a, u], taps[b, v]] if (a, u) in taps and (b, v) in taps else zero
      for u in (0, 1)
      for v in (0, 1)
      for a in (0, 1)
      for b in (0, 1)
    ]
  )  # [uvab, C, D]
  phases = phases.reshape(2, 2, 4 * channels, -1).swapaxes(2, 3)
  dx = _conv(g, phases, 1).reshape(n, height // 2, width // 2, 2, 2, channels)
  return dx.swapaxes(2, 3).reshape(shape)


@partial(custom_partitioning, static_argnums=(2, 3))
def _weight_gradient_cpu(x, g, size, stride):
  """A product of matrices for every row of taps, over chunks that fit a core's cache.

  Each device sums over its own images and the sums are added: the partitioner cannot
  see that through a loop, hence the rule below.
  """
  n, height, width, outputs = g.shape
  channels = x.shape[-1]
  before, after = (size - 1) // 2, size // 2
  most = max(1, CHUNK // (height * width))
  images = max(count for count in range(1, most + 1) if n % count == 0)
  rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1

  def products(x, g):  # of a chunk: [D, k * k * C]
    # Barriers keep the transposition and the columns from being computed repeatedly.
    g = lax.optimization_barrier(g.reshape(-1, outputs).T)
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    x = [x[:, :, j : j + columns : stride] for j in range(size)]
    x = lax.optimization_barrier(jnp.concatenate(x, axis=-1))
    x = [x[:, i : i + rows : stride] for i in range(size)]
    dot = partial(jnp.matmul, preferred_element_type=jnp.float32)
    return jnp.concatenate([dot(g, y.reshape(-1, size * channels)) for y in x], axis=1)

  def add(i, total):
    part = partial(lax.dynamic_slice_in_dim, start_index=i * images, slice_size=images)
    return total + products(part(x), part(g))

  total = jnp.zeros((outputs, size * size * channels), jnp.float32)
  total = lax.fori_loop(0, n // images, add, total)
  total = total.reshape(outputs, size, size, channels)
  return total.transpose(1, 2, 3, 0)  # float32, also for operands of bfloat16


def _partition(size, stride, mesh, arguments, result):
  """Devices that share the batch each take their images, then all add up."""
  del result
  batch = arguments[1].sharding.spec[0]
  rows = NamedSharding(mesh, PartitionSpec(batch))

  def local(x, g):
    total = _weight_gradient_cpu.fun(x, g, size, stride)
    return total if batch is None else lax.psum(total, batch)

  return mesh, local, NamedSharding(mesh, PartitionSpec()), (rows, rows)


_weight_gradient_cpu.def_partition(
  _partition,
  sharding_rule="n h w c, n y x d -> i j c d",
  reduction_factors=("n",),
  need_replication_factors=("h", "w", "c", "y", "x", "d", "i", "j"),
)


class Conv(nn.Module):
  """A square convolution without bias; He initialisation by fan-out."""

  features: int
  size: int = 3
  stride: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
      "kernel",
      nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
      (self.size, self.size, x.shape[-1], self.features),
    )
    return conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
