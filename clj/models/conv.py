"""Convolution that is fast on every platform.

XLA's CPU backend has two weaknesses. It multiplies through every tap of a 3x3
convolution, and it computes the gradients as exotic convolutions on a slow path. Here,
and only on CPU, the same sums are written as matrix products: those of Winograd's
minimal filtering, 16 multiplications for 4 outputs instead of 36, where a 3x3
convolution of stride 1 in float32 has many channels, and one for every row of taps in
the weight gradient of the others. Equal up to the rounding of float32. Everywhere else
the program holds XLA's own convolutions and nothing of this file
(`lax.platform_dependent`).
"""

import functools
import operator
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

CHUNK = 1024  # output positions that are worked on at once: what fits a core's cache
CHANNELS = 32  # with fewer in or out, Winograd's transforms cost more than they save


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
  default = partial(_conv, stride=stride)
  if not _minimal(x.shape, kernel.shape, stride, x.dtype):
    return default(x, kernel)
  # A rule for `vmap`, which `custom_partitioning` has none of: one after the other.
  cpu = sequential_vmap(lambda x, kernel: _winograd(x, kernel, False))
  return lax.platform_dependent(x, kernel, cpu=cpu, default=default)


def _conv_fwd(x, kernel, stride):
  return conv(x, kernel, stride), (x, kernel)


def _conv_bwd(stride, saved, g):
  x, kernel = saved
  size = len(kernel)
  dx_cpu = sequential_vmap(
    lambda kernel, g: _input_gradient_cpu(kernel, g, shape=x.shape, stride=stride)
  )
  dkernel_cpu = sequential_vmap(
    lambda x, g: _weight_gradient_cpu(x, g, size, stride).astype(x.dtype)
  )
  dx = lax.platform_dependent(
    kernel,
    g,
    cpu=dx_cpu,
    default=partial(_input_gradient, shape=x.shape, stride=stride),
  )
  dkernel = lax.platform_dependent(
    x, g, cpu=dkernel_cpu, default=partial(_weight_gradient, size=size, stride=stride)
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
  """With stride 2, pixels of one parity see the same taps: four small convolutions."""
  _, height, width, channels = shape
  size = kernel.shape[0]
  if _minimal(shape, kernel.shape, stride, g.dtype):
    return _winograd(g, kernel, True)
  if stride != 2 or size not in (1, 3) or height % 2 or width % 2:
    return _input_gradient(kernel, g, shape=shape, stride=stride)
  if size == 1:
    dx = jnp.einsum("nhwd,cd->nhwc", g, kernel[0, 0])
    return lax.pad(
      dx, jnp.zeros((), g.dtype), ((0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0))
    )
  _, rows, columns, outputs = g.shape
  padded = jnp.pad(g, ((0, 0), (0, 1), (0, 1), (0, 0)))
  shifted = lambda u, v: padded[:, u : u + rows, v : v + columns].reshape(-1, outputs)
  g = lax.optimization_barrier([[shifted(u, v) for v in (0, 1)] for u in (0, 1)])
  # Pixel 2p + a takes tap i from g[p + (a + 1 - i) / 2]: an even one tap 1 at p, an odd
  # one tap 2 at p and tap 0 at p + 1.
  taps = [(1, 0)], [(2, 0), (0, 1)]  # (tap, offset) of either parity
  pixel = lambda a, b: sum(
    _dot(g[u][v], kernel[i, j], 1, 1) for i, u in a for j, v in b
  )
  dx = jnp.stack([jnp.stack([pixel(a, b) for b in taps]) for a in taps])
  return _images(dx, shape).astype(g[0][0].dtype)


def _dot(a, b, i, j):
  """Contracts axis i of a with axis j of b, accumulating in float32."""
  dimensions = (((i,), (j,)), ((), ()))
  return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _blocks(x, size):
  """Pixel (i, j) of all blocks, 2 apart: `[size, size, n, H / 2, W / 2, C]`."""
  rows, columns = x.shape[1] - size + 1, x.shape[2] - size + 1
  pixel = lambda i, j: x[:, i : i + rows : 2, j : j + columns : 2]
  return jnp.stack([jnp.stack([pixel(i, j) for j in range(size)]) for i in range(size)])


def _images(blocks, shape):
  """The images `[n, H, W, C]` of this shape from pixels (i, j) of all 2x2 blocks."""
  n, height, width, channels = shape
  blocks = blocks.reshape(2, 2, n, height // 2, width // 2, channels)
  return blocks.transpose(2, 3, 0, 4, 1, 5).reshape(shape)


def _images_a_chunk(shape):
  """The most images `[N, H, W, C]` of CHUNK positions at most, a divisor of N."""
  n, height, width, _ = shape
  most = max(1, CHUNK // (height * width))
  return max(count for count in range(1, most + 1) if n % count == 0)


def _transpose(a):
  """The last two axes exchanged, block by block.

  XLA would transpose anew in every operation that reads a plain transposition.
  """
  blocks = [a[..., i : i + 64, :].mT for i in range(0, a.shape[-2], 64)]
  return lax.optimization_barrier(jnp.concatenate(blocks, axis=-1))


# Winograd's F(2x2, 3x3) (arXiv:1509.09308, section 4.1). With d a 4x4 tile of the
# image, k the kernel and * the product of elements, which are matrices of channels,
#
#   y = A' [(G k G') * (B' d B)] A,   dk = G' [(B' d B) * (A dy A')] G.

A = ((1, 0), (1, 1), (1, -1), (0, -1))
B = ((1, 0, 0, 0), (0, 1, -1, 1), (-1, 1, 1, 0), (0, 0, 0, -1))
G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))


def _minimal(shape, kernel_shape, stride, dtype):
  """Whether Winograd's form pays."""
  _, height, width, _ = shape
  return (
    kernel_shape[:2] == (3, 3)
    and stride == 1
    and min(kernel_shape[2:]) >= CHANNELS
    and height % 2 == width % 2 == 0
    and dtype == jnp.float32
  )


def _transposed(m):
  return tuple(zip(*m, strict=True))


def _mix(m, arrays):
  """Sums of arrays, a row of numbers each."""

  def mix(row):
    terms = [c * a for c, a in zip(row, arrays, strict=True) if c]
    return functools.reduce(operator.add, terms)

  return jnp.stack([mix(row) for row in m])


def _sandwich(m, a):
  """`m a m'` over the first two axes of an array, transposed: a[i, j] -> [j, i]."""
  return _mix(m, _mix(m, a).swapaxes(0, 1))


def _winograd_tiles(x):
  """B' d B of all tiles of the images, transposed: `[4, 4, tiles, C]`."""
  _, height, width, channels = x.shape
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  x = _mix(_transposed(B), [x[:, i : i + height - 1 : 2] for i in range(4)])
  x = _mix(_transposed(B), [x[..., j : j + width - 1 : 2, :] for j in range(4)])
  return lax.optimization_barrier(x.reshape(4, 4, -1, channels))


@partial(custom_partitioning, static_argnums=(2,))
def _winograd(x, kernel, backward):
  """The convolution, or its gradient in the input from that of the output."""
  kernel = _sandwich(G, kernel[::-1, ::-1]).mT if backward else _sandwich(G, kernel)
  images = _images_a_chunk(x.shape)
  shape = (images, *x.shape[1:3], kernel.shape[-1])

  def convolve(i, y):
    tiles = _winograd_tiles(lax.dynamic_slice_in_dim(x, i * images, images))
    products = lax.optimization_barrier(jnp.matmul(tiles, kernel))
    part = _images(_sandwich(_transposed(A), products), shape)
    return lax.dynamic_update_slice_in_dim(y, part, i * images, axis=0)

  y = jnp.zeros((len(x), *shape[1:]), x.dtype)
  return lax.fori_loop(0, len(x) // images, convolve, y)


def _winograd_products(x, g):
  """(B' d B) * (A dy A') with its matrices transposed: `[4, 4, D, C]`."""
  g = _transpose(_blocks(g, 2).reshape(2, 2, -1, g.shape[-1]))
  return jnp.matmul(lax.optimization_barrier(_sandwich(A, g)), _winograd_tiles(x))


def _row_products(x, g, size, stride):
  """A product for every row of taps: a list of `[D, k * C]`."""
  _, height, width, outputs = g.shape
  before, after = (size - 1) // 2, size // 2
  rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
  g = _transpose(g.reshape(-1, outputs))
  x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
  x = [x[:, :, j : j + columns : stride] for j in range(size)]
  x = lax.optimization_barrier(jnp.concatenate(x, axis=-1))
  x = [x[:, i : i + rows : stride].reshape(-1, x.shape[-1]) for i in range(size)]
  return [_dot(g, row, 1, 0) for row in x]


@partial(custom_partitioning, static_argnums=(2, 3))
def _weight_gradient_cpu(x, g, size, stride):
  """A sum of products over chunks that fit a core's cache; float32 for bfloat16 too."""
  outputs, channels = g.shape[-1], x.shape[-1]
  minimal = _minimal(x.shape, (size, size, channels, outputs), stride, x.dtype)
  products = partial(_row_products, size=size, stride=stride)
  products = _winograd_products if minimal else products
  images = _images_a_chunk(g.shape)

  def chunk(i):
    part = partial(lax.dynamic_slice_in_dim, start_index=i * images, slice_size=images)
    return products(part(x), part(g))

  def add(i, total):
    return jax.tree.map(operator.add, total, chunk(i))

  total = lax.fori_loop(1, len(g) // images, add, chunk(0))
  if minimal:
    return _sandwich(_transposed(G), _transpose(total))
  total = jnp.stack(total).reshape(size, outputs, size, channels)
  return total.transpose(0, 2, 3, 1)


def _partition_winograd(backward, mesh, arguments, result):
  """Devices that share the batch each take their images."""
  del result
  rows = NamedSharding(mesh, PartitionSpec(arguments[0].sharding.spec[0]))
  whole = NamedSharding(mesh, PartitionSpec())
  local = lambda x, kernel: _winograd.fun(x, kernel, backward)
  return mesh, local, rows, (rows, whole)


def _partition_weight_gradient(size, stride, mesh, arguments, result):
  """Devices that share the batch each take their images, then all add up."""
  del result
  batch = arguments[1].sharding.spec[0]
  rows = NamedSharding(mesh, PartitionSpec(batch))

  def local(x, g):
    total = _weight_gradient_cpu.fun(x, g, size, stride)
    return total if batch is None else lax.psum(total, batch)

  return mesh, local, NamedSharding(mesh, PartitionSpec()), (rows, rows)


# The partitioner cannot see through the loops, hence these rules.
_winograd.def_partition(
  _partition_winograd,
  sharding_rule="n h w c, i j k l -> n h w d",
  need_replication_factors=("h", "w", "c", "i", "j", "k", "l", "d"),
)
_weight_gradient_cpu.def_partition(
  _partition_weight_gradient,
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
