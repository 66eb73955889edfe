"""Small networks on features: projectors, predictors and the linear classifier."""

import flax.linen as nn

from clj.models.norm import BatchNorm


class MLP(nn.Module):
  """See `clj.models.projector`."""

  widths: tuple[int, ...]
  norm: bool
  bias: bool
  last_norm: bool
  last_gamma: bool
  last_beta: bool
  last_bias: bool
  std: float | None
  dtype: str

  @nn.compact
  def __call__(self, x, train):
    if self.std is None:
      init = nn.initializers.lecun_normal()
    else:
      init = nn.initializers.normal(self.std)
    last = len(self.widths)
    for i, width in enumerate(self.widths, 1):
      bias = self.bias if i < last else self.last_bias
      x = nn.Dense(
        width, use_bias=bias, kernel_init=init, dtype=self.dtype, name=f"dense{i}"
      )(x)
      if i < last:
        if self.norm:
          x = BatchNorm(dtype=self.dtype, name=f"bn{i}")(x, train)
        x = nn.relu(x)
      elif self.last_norm:
        x = BatchNorm(scale=self.last_gamma, bias=self.last_beta, name=f"bn{i}")(
          x, train
        )
    return x.astype("float32")


class Linear(nn.Module):
  """See `clj.models.linear`."""

  outputs: int

  @nn.compact
  def __call__(self, x, train):
    del train
    return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros, name="dense")(x)
