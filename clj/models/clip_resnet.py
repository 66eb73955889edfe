"""The residual networks of CLIP (Radford et al., arXiv:2103.00020).

Three things differ from `resnet.py` (section 2.4 of the paper): a stem of three 3x3
convolutions and an average pool; strides that are average pools before a convolution,
so that nothing is subsampled unfiltered; and attention in place of the last average
pool, whose output has the width of the joint space: there is no projection after it.
"""

import flax.linen as nn
import jax.numpy as jnp

from clj.models.conv import Conv
from clj.models.norm import BatchNorm
from clj.models.transformer import Attention, Init, keep_shape, normal
from clj.models.vit import normalize, resize_positions


def halve(x):
  return nn.avg_pool(x, (2, 2), (2, 2))


class Block(nn.Module):
  """1x1, 3x3 and 1x1 convolution, and a shortcut. Starts at the shortcut alone."""

  features: int  # of the inner convolutions; the output has four times as many
  stride: int  # 1 or 2
  dtype: str

  @nn.compact
  def __call__(self, x, train):
    def conv(x, features, size, name):
      return Conv(features, size, dtype=self.dtype, name=name)(x)

    def norm(x, name, zero_scale=False):
      return BatchNorm(zero_scale=zero_scale, dtype=self.dtype, name=name)(x, train)

    y = nn.relu(norm(conv(x, self.features, 1, "conv1"), "bn1"))
    y = nn.relu(norm(conv(y, self.features, 3, "conv2"), "bn2"))
    if self.stride == 2:
      y, x = halve(y), halve(x)
    outputs = 4 * self.features
    y = norm(conv(y, outputs, 1, "conv3"), "bn3", zero_scale=True)
    if self.stride == 2 or x.shape[-1] != outputs:
      x = norm(conv(x, outputs, 1, "conv_shortcut"), "bn_shortcut")
    return nn.relu(x + y)


class AttentionPool(nn.Module):
  """The mean of `[N, H, W, C]` looks at itself and all positions -> `[N, outputs]`."""

  heads: int
  outputs: int
  dtype: str

  @nn.compact
  def __call__(self, x):
    n, rows, columns, width = x.shape
    std = width**-0.5
    shape = (rows, columns, width)
    table = keep_shape(self, "position", normal(std), *shape)
    mean_position = self.param("mean_position", normal(std), (width,))
    position = resize_positions(table, rows, columns)
    mean = x.mean((1, 2), dtype=jnp.float32) + mean_position[None]
    mean = mean.astype(self.dtype)[:, None]
    x = (x + position.astype(self.dtype)[None]).reshape(n, rows * columns, width)
    context = jnp.concatenate([mean, x], axis=1)
    inits = Init(*[normal(std)] * 4)
    attention = Attention(
      self.heads, inits, self.dtype, outputs=self.outputs, name="attention"
    )
    return attention(mean, context)[:, 0]


class CLIPResNet(nn.Module):
  """`[N, H, W, 3]` in [0, 1] -> features `[N, outputs]` float32.

  width: of the stem; the inner convolutions of the stages have 1, 2, 4 and 8 times it.
  depths: blocks of each stage.
  outputs: width of the joint space. The authors' weights end there.
  heads: of the attention pool; its positions are those of the images given to `init`,
    and are resized for other images (bicubic).
  mean, std: of the pixels, per channel; for towers that expect normalised ones.
  remat: keep only the input of each block for the backward pass, recompute the rest.
  dtype: of the computation; parameters, statistics and features are float32.

  Batch norm after every convolution; the last one of a block starts at zero.
  """

  width: int
  depths: tuple[int, ...]
  outputs: int
  heads: int | None = None  # one for every 64 channels
  mean: tuple[float, ...] = (0.0, 0.0, 0.0)
  std: tuple[float, ...] = (1.0, 1.0, 1.0)
  remat: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, train):
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    x = normalize(x, self.mean, self.std).astype(self.dtype)
    stem = ((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))
    for i, (features, stride) in enumerate(stem, 1):
      x = Conv(features, 3, stride, dtype=self.dtype, name=f"conv{i}")(x)
      x = nn.relu(BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train))
    x = halve(x)
    for i, depth in enumerate(self.depths):
      for j in range(depth):
        x = block(
          self.width * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          dtype=self.dtype,
          name=f"stage{i + 1}_block{j + 1}",
        )(x, train)
    heads = self.heads or x.shape[-1] // 64
    x = AttentionPool(heads, self.outputs, self.dtype, name="pool")(x)
    return x.astype(jnp.float32)
