"""Batch normalisation whose statistics are those of the whole batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9
EPSILON = 1e-5


class BatchNorm(nn.Module):
  """Normalises over all axes but the last (Ioffe and Szegedy, arXiv:1502.03167).

  Statistics, parameters and arithmetic are float32, the result has `dtype`. Under jit
  the batch is global, and so are its statistics, however many devices hold it. Running
  averages have momentum 0.9 and keep the biased variance.
  """

  scale: bool = True
  bias: bool = True
  zero_scale: bool = False  # start at 0: the last norm of a residual branch
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, train):
    features = x.shape[-1]
    axes = tuple(range(x.ndim - 1))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,))
    running_var = self.variable("batch_stats", "var", jnp.ones, (features,))
    x = x.astype(jnp.float32)
    if train:
      mean = x.mean(axes)
      var = jnp.square(x - mean.reshape((1,) * len(axes) + (-1,))).mean(axes)
      if not self.is_initializing():
        running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
        running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
    else:
      mean, var = running_mean.value, running_var.value
    factor = jax.lax.rsqrt(var + EPSILON)
    if self.scale:
      init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
      factor = factor * self.param("scale", init, (features,))
    shift = -mean * factor
    if self.bias:
      shift = shift + self.param("bias", nn.initializers.zeros, (features,))
    broadcast = (1,) * len(axes) + (-1,)
    y = x * factor.reshape(broadcast) + shift.reshape(broadcast)
    return y.astype(self.dtype)
