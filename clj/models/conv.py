"""Convolution whose gradients are fast on every platform.

XLA's CPU backend computes the gradients of a convolution as exotic convolutions, on a
slow path: the weight gradient of a 3x3 convolution at 32 x 32 x 64 runs at a quarter of
the speed of the forward pass. Here, and only on CPU, the same sums are written as
matrix products: equal up to the order of float32 additions. Everywhere else the program
holds XLA's own gradients and nothing of this file (`lax.platform_dependent`).
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 1024  # output positions that a lane works on at once: what fits a core's cache
LANES = 8  # independent partial sums, so that a batch split over 2, 4, 8 devices stays


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
    cpu=partial(_weight_gradient_cpu, size=kernel.shape[0], stride=stride),
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


def _weight_gradient_cpu(x, g, *, size, stride):
  """One matrix product a tap: outputs' gradients by the shifted inputs.

  The batch is cut into lanes, each with its own partial sum and hence free of
  communication when devices share the batch, and a lane into chunks that fit the cache.
  """
  n, height, width, outputs = g.shape
  channels = x.shape[-1]
  before, after = (size - 1) // 2, size // 2

  def products(x, g):  # [L, m, H, W, C], [L, m, h, w, D] -> [k * k, L, D, C]
    lanes = g.shape[0]
    # The barrier keeps the transposition out of the products, where it is repeated.
    g = g.reshape(lanes, -1, outputs).swapaxes(1, 2)
    g = lax.optimization_barrier(g)
    x = jnp.pad(x, ((0, 0), (0, 0), (before, after), (before, after), (0, 0)))
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    taps = [
      x[:, :, i : i + rows : stride, j : j + columns : stride]
      for i in range(size)
      for j in range(size)
    ]
    return jnp.stack(
      [
        jnp.matmul(
          g, tap.reshape(lanes, -1, channels), preferred_element_type=jnp.float32
        )
        for tap in taps
      ]
    )

  lanes = math.gcd(n, LANES)
  images = math.gcd(n // lanes, max(1, CHUNK // (height * width)))
  chunks = n // (lanes * images)
  x = x.reshape(lanes, chunks, images, *x.shape[1:])
  g = g.reshape(lanes, chunks, images, *g.shape[1:])

  def add(i, total):
    part = partial(lax.dynamic_index_in_dim, index=i, axis=1, keepdims=False)
    return total + products(part(x), part(g))

  if chunks == 1:
    total = products(x[:, 0], g[:, 0])
  else:
    total = jnp.zeros((size * size, lanes, outputs, channels), jnp.float32)
    total = lax.fori_loop(0, chunks, add, total)
  dkernel = total.sum(1).reshape(size, size, outputs, channels).swapaxes(2, 3)
  return dkernel.astype(x.dtype)


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
