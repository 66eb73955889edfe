"""Convolution, float32 parameters, any compute dtype."""

import flax.linen as nn
from jax import lax


def conv(x, kernel, stride):
  """`[N, H, W, C]` by `[k, k, C, D]` -> `[N, ceil(H / stride), ceil(W / stride), D]`.

  Zero padding of `(k - 1) // 2` before and `k // 2` after, whatever the stride: what
  PyTorch's `padding=k // 2` is for odd k, and not TensorFlow's SAME, which shifts
  strided convolutions of even sizes by a pixel.
  """
  size = kernel.shape[0]
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=(((size - 1) // 2, size // 2),) * 2,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
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
