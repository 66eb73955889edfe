"""Vision transformers (Dosovitskiy et al., arXiv:2010.11929) as joint embedding uses
them: CLIP's (arXiv:2103.00020), SigLIP's (arXiv:2303.15343) and the plain one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from clj.cli import UserError
from clj.models.dense import layer_norm, linear
from clj.models.transformer import (
  INITS,
  MLP,
  Attention,
  Encoder,
  keep_shape,
  normal,
  uniform,
)


def sincos2d(rows, columns, width):
  """Fixed positions `[rows, columns, width]`, float32 (MoCo v3, arXiv:2104.02057).

  A quarter of the channels each: sine and cosine of the row, then of the column, times
  frequencies from 1 down to 1 / 10,000.
  """
  if width % 4:
    raise UserError(f"sine-cosine positions need a width divisible by 4, not {width}")
  frequencies = 1e4 ** (-jnp.arange(width // 4) / (width // 4))
  row = jnp.arange(rows)[:, None] * frequencies[None]
  column = jnp.arange(columns)[:, None] * frequencies[None]
  row = jnp.concatenate([jnp.sin(row), jnp.cos(row)], axis=1)[:, None]
  column = jnp.concatenate([jnp.sin(column), jnp.cos(column)], axis=1)[None]
  shape = (rows, columns, width // 2)
  return jnp.concatenate(
    [jnp.broadcast_to(row, shape), jnp.broadcast_to(column, shape)], axis=2
  )


def resize_positions(table, rows, columns, *, antialias=True, offset=0.0):
  """A learned table `[h, w, D]` for another grid, bicubic; as it is for the same grid.

  antialias: without, the other cubic kernel that PyTorch then has (a = -0.75, edges
    repeated): DINOv2's models without registers (arXiv:2304.07193) expect that.
  offset: counts into the scale, not the grid: (rows + offset) / h; 0.1 for those.
  """
  grid = rows, columns
  if table.shape[:2] == grid:
    return table
  # PyTorch leaves an axis of the same length alone, though only where antialiased.
  axes = [i for i in (0, 1) if not antialias or table.shape[i] != grid[i]]
  scale = jnp.array([(grid[i] + offset) / table.shape[i] for i in axes])
  return jax.image.scale_and_translate(
    table,
    (*grid, table.shape[-1]),
    axes,
    scale,
    jnp.zeros(len(axes)),
    "cubic-pytorch",
    antialias,
  )


class AttentionPool(nn.Module):
  """One learned query looks at all tokens: `[N, T, D]` -> `[N, D]`.

  The multi-head attention pooling of arXiv:2106.04560: attention, then a perceptron
  with a residual.
  """

  heads: int
  hidden: int
  activation: str
  eps: float
  kernel_init: str
  dtype: str

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    init = INITS[self.kernel_init](width, self.hidden, 1)
    probe = self.param("probe", uniform((6 / (1 + width)) ** 0.5), (width,))
    probe = jnp.broadcast_to(
      probe.astype(self.dtype)[None, None], (x.shape[0], 1, width)
    )
    x = Attention(self.heads, init, self.dtype, name="attention")(probe, x)
    y = layer_norm(self.eps, self.dtype, "ln")(x)
    y = MLP(self.hidden, self.activation, init, self.dtype, name="mlp")(y)
    return (x + y)[:, 0]


class ViT(nn.Module):
  """`[N, H, W, 3]` in [0, 1] -> features `[N, width]` float32.

  encoder: the layers.
  width: of the tokens.
  patch: side of the square patches; what remains at the lower and right edge of a
    picture that they do not divide is left out, as in SigLIP's 384-pixel models.
  pool: "cls" is the class token, "mean" the average over the patches, "map" attention
    pooling, "tokens" no pooling: `[N, T, width]`, first the class token, then
    registers, then patches by rows.
  cls: whether there is a class token; by default, unless `pool` is "mean" or "map".
  positions: "learned", whose grid is that of the images given to `init`, and which are
    resized for other images (bicubic), or "sincos2d", which are fixed.
  patch_bias, pre_norm: a bias of the patches' linear map; a layer norm before the
    layers (CLIP has no such bias and has this norm).
  registers: number of registers, tokens without a position (arXiv:2309.16588).
  mask_token: replace the patches where `mask`, a second input `[N, H / patch,
    W / patch]`, is True by a learned token.
  patch_dropout: share of the patches left out in training (FLIP, arXiv:2212.00794).
  mean, std: of the pixels, per channel; for towers that expect normalised ones.
  """

  encoder: Encoder
  width: int
  patch: int
  pool: str = "cls"
  cls: bool | None = None
  positions: str = "learned"
  patch_bias: bool = True
  pre_norm: bool = False
  registers: int = 0
  mask_token: bool = False
  patch_dropout: float = 0.0
  mean: tuple[float, ...] = (0.0, 0.0, 0.0)
  std: tuple[float, ...] = (1.0, 1.0, 1.0)

  @nn.compact
  def __call__(self, x, mask=None, *, train):
    pools = ("cls", "mean", "map", "tokens")
    if self.pool not in pools:
      raise UserError(f"unknown pool {self.pool!r}; there are {', '.join(pools)}")
    cls = self.pool in ("cls", "tokens") if self.cls is None else self.cls
    if self.pool == "cls" and not cls:
      raise UserError("pool 'cls' needs a class token: cls=True")
    if mask is not None and not self.mask_token:
      raise UserError("masked patches need mask_token=True")
    dtype, width = self.encoder.dtype, self.width
    clip = self.encoder.kernel_init == "torch"

    x = normalize(x, self.mean, self.std)
    x = linear(
      width,
      dtype,
      use_bias=self.patch_bias,
      kernel_init=uniform((3 * self.patch**2) ** -0.5)
      if clip
      else nn.initializers.lecun_normal(),
      name="patch",
    )(patches(x, self.patch))
    rows, columns = x.shape[1:3]
    if self.mask_token:
      token = self.param("mask", normal(0.02), (width,))
      if mask is not None:
        x = jnp.where(mask[..., None], token.astype(dtype)[None, None, None], x)
    x = x + self.position(rows, columns).astype(dtype)[None]
    x = x.reshape(len(x), rows * columns, width)
    if train and self.patch_dropout:
      x = drop_patches(self.make_rng("dropout"), x, self.patch_dropout)

    first = []  # tokens before the patches
    if cls:
      token = self.param("cls", normal(width**-0.5 if clip else 0.0), (width,))
      if self.positions == "learned":
        token = token + self.param("cls_position", normal(width**-0.5), (width,))
      first.append(token[None])
    if self.registers:
      shape = (self.registers, width)
      first.append(self.param("registers", normal(1e-6), shape))
    if first:
      first = jnp.concatenate(first).astype(dtype)[None]
      first = jnp.broadcast_to(first, (len(x), *first.shape[1:]))
      x = jnp.concatenate([first, x], axis=1)

    if self.pre_norm:
      x = layer_norm(self.encoder.eps, dtype, "ln_pre")(x)
    x = self.encoder(x, None, train)
    x = layer_norm(self.encoder.eps, dtype, "ln_post")(x)
    if self.pool == "cls":
      x = x[:, 0]
    elif self.pool == "mean":
      x = x[:, cls + self.registers :].mean(1, dtype=jnp.float32)
    elif self.pool == "map":
      x = AttentionPool(
        self.encoder.heads,
        self.encoder.hidden or 4 * width,
        self.encoder.activation,
        self.encoder.eps,
        self.encoder.kernel_init,
        dtype,
        name="map",
      )(x)
    return x.astype(jnp.float32)

  def position(self, rows, columns):
    if self.positions == "sincos2d":
      return sincos2d(rows, columns, self.width)
    if self.positions != "learned":
      raise UserError(
        f"unknown positions {self.positions!r}; there are learned, sincos2d"
      )
    shape = (rows, columns, self.width)
    table = keep_shape(self, "position", normal(self.width**-0.5), *shape)
    return resize_positions(table, rows, columns)


def normalize(x, mean, std):
  mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (mean, std))
  return (x - mean) / std


def patches(x, size):
  """`[N, H, W, C]` -> `[N, H // size, W // size, size * size * C]`."""
  n, height, width, channels = x.shape
  rows, columns = height // size, width // size
  if not rows or not columns:
    raise UserError(f"an image of {height} x {width} has no patch of {size} pixels")
  x = x[:, : rows * size, : columns * size]
  x = x.reshape(n, rows, size, columns, size, channels).swapaxes(2, 3)
  return x.reshape(n, rows, columns, -1)


def drop_patches(rng, x, rate):
  """Keeps a random set of `x`'s tokens, of one size, for every example on its own."""
  n, tokens, _ = x.shape
  keep = max(1, int(tokens * (1 - rate)))
  # A sort stays on each example's device; `top_k` gathers the whole batch.
  index = jax.random.uniform(rng, (n, tokens)).argsort(axis=1)[:, :keep]
  return jnp.take_along_axis(x, index[..., None], axis=1)
