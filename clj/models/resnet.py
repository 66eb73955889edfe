"""Residual networks (He et al., arXiv:1512.03385) as contrastive learning uses them.

The stride of a bottleneck block is in its 3x3 convolution and shortcuts that change
the shape are a strided 1x1 convolution, as in torchvision and in SimCLR's code. The
width multiplier scales every layer, the stem included (SimCLR, arXiv:2002.05709).
Padding is symmetric, also that of the max-pool.
"""

import flax.linen as nn
import jax.numpy as jnp

from clj.cli import UserError
from clj.models.conv import Conv
from clj.models.norm import BatchNorm

# Size and stride.
STEMS = {"imagenet": (7, 2), "cifar": (3, 1), "patch": (2, 2), "patch4": (4, 4)}


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut; or, with `bottleneck`, 1x1, 3x3, 1x1."""

  features: int  # of the inner convolutions
  stride: int
  bottleneck: bool
  zero_last_gamma: bool
  dtype: str

  @nn.compact
  def __call__(self, x, train):
    def conv(features, size, stride, name):
      return Conv(features, size, stride, dtype=self.dtype, name=name)

    def norm(y, name, zero_scale=False):
      return BatchNorm(zero_scale=zero_scale, dtype=self.dtype, name=name)(y, train)

    if self.bottleneck:
      outputs = 4 * self.features
      y = conv(self.features, 1, 1, "conv1")(x)
      y = nn.relu(norm(y, "bn1"))
      y = conv(self.features, 3, self.stride, "conv2")(y)
      y = nn.relu(norm(y, "bn2"))
      y = conv(outputs, 1, 1, "conv3")(y)
      y = norm(y, "bn3", self.zero_last_gamma)
    else:
      outputs = self.features
      y = conv(self.features, 3, self.stride, "conv1")(x)
      y = nn.relu(norm(y, "bn1"))
      y = conv(outputs, 3, 1, "conv2")(y)
      y = norm(y, "bn2", self.zero_last_gamma)
    if self.stride != 1 or x.shape[-1] != outputs:
      x = conv(outputs, 1, self.stride, "conv_shortcut")(x)
      x = norm(x, "bn_shortcut")
    return nn.relu(x + y)


class ResNet(nn.Module):
  """`[N, H, W, 3]` in [0, 1] -> features `[N, d]`, float32, after the average pool.

  widths: inner channels of each stage; every stage but the first halves the sides.
  depths: blocks of each stage.
  stem: "imagenet" is a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2;
    "cifar" a 3x3 convolution of stride 1; "patch" a 2x2 convolution of stride 2, a
    linear map of patches, which costs next to nothing; "patch4" one of 4x4.
  zero_last_gamma: start every residual branch at zero.
  dtype: of the computation; parameters, statistics and features are float32.
  """

  widths: tuple[int, ...]
  depths: tuple[int, ...]
  bottleneck: bool
  stem: str
  zero_last_gamma: bool = True
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, train):
    if self.stem not in STEMS:
      raise UserError(f"unknown stem {self.stem!r}; there are {', '.join(STEMS)}")
    size, stride = STEMS[self.stem]
    x = Conv(self.widths[0], size, stride, dtype=self.dtype, name="conv_stem")(x)
    x = nn.relu(BatchNorm(dtype=self.dtype, name="bn_stem")(x, train))
    if self.stem == "imagenet":
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
      for j in range(depth):
        x = Block(
          width,
          stride=2 if i > 0 and j == 0 else 1,
          bottleneck=self.bottleneck,
          zero_last_gamma=self.zero_last_gamma,
          dtype=self.dtype,
          name=f"stage{i + 1}_block{j + 1}",
        )(x, train)
    return x.mean((1, 2), dtype=jnp.float32)
