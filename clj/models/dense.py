"""What transformers are made of, fast on every platform.

XLA's CPU backend has three weaknesses here. It contracts tokens and examples as two
axes, for which it transposes first. It computes sums of elements anew wherever they are
read, so that every layer sums up the residual stream from the first one again, and its
gradient from the last. And what is kept for the backward pass comes from the system,
which clears it page by page: that costs more than to compute it twice. So on CPU, in
float32, weight gradients are products of matrices, the stream is computed once
(`settle`), and a layer keeps its products and little else. Values are those of flax up
to the rounding of float32.

Since another platform is to keep what JAX chooses, it is decided while tracing, by
`sharding.platform()`; programs for accelerators are flax's own and hold nothing of this
file.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from clj import sharding


def on_cpu(dtype) -> bool:
  """Whether a program on arrays of this type takes the forms for CPUs."""
  return jnp.dtype(dtype) == jnp.float32 and sharding.platform() == "cpu"


def _product(x, kernel):
  return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def dense(x, kernel):
  """`[..., C]` by `[C, D]` -> `[..., D]`."""
  return _product(x, kernel)


def _dense_bwd(saved, g):
  x, kernel = saved
  x, rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))
  dx = lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
  return dx, lax.dot_general(x, rows, (((0,), (0,)), ((), ())))


dense.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _dense_bwd)


def _apart(function, *arrays):
  """`function(*arrays)`, which XLA neither fuses with its readers nor finds elsewhere.

  Its own barriers are dropped before it fuses. A condition of which it does not know
  that it holds is not; the other branch never runs.
  """
  holds = lax.optimization_barrier(jnp.bool_(True))
  zeros = lambda *arrays: jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *arrays)
  )
  return lax.cond(holds, function, zeros, *arrays)


@jax.custom_vjp
def _settle(x):
  return _apart(lambda x: x, x)


_settle.defvjp(lambda x: (_settle(x), None), lambda _, g: (_settle(g),))


def settle(x):
  """x, which a CPU computes once, and so its gradient, however many read them."""
  return _settle(x) if on_cpu(x.dtype) else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate(function, x):
  return _apart(function, x)


def _activate_bwd(function, x, g):
  return (_apart(lambda x, g: jax.vjp(function, x)[1](g)[0], x, g),)


_activate.defvjp(lambda function, x: (_activate(function, x), x), _activate_bwd)


def activate(function, x):
  """`function(x)`, element by element; a CPU keeps x alone for the backward pass."""
  return _activate(function, x) if on_cpu(x.dtype) else function(x)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x, scale, bias, eps):
  """Layer norm of `[..., C]`, with the variance in two passes."""
  return _normalize_fwd(x, scale, bias, eps)[0]


def _normalize_fwd(x, scale, bias, eps):
  mean = x.mean(-1, keepdims=True)
  r = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + eps)
  y = (x - mean) * (r * _row(scale, x)) + _row(bias, x)
  return y, (x, scale, mean, r)


def _normalize_bwd(eps, saved, g):
  del eps
  x, scale, mean, r = saved
  y = (x - mean) * r
  rows = tuple(range(x.ndim - 1))
  dy = g * _row(scale, x)
  along = (dy * y).mean(-1, keepdims=True)
  dx = r * (dy - dy.mean(-1, keepdims=True) - y * along)
  return dx, (g * y).sum(rows), g.sum(rows)


normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _row(vector, x):
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class LayerNorm(nn.Module):
  """`nn.LayerNorm` on a CPU, with the same parameters."""

  eps: float

  @nn.compact
  def __call__(self, x):
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    return normalize(x, scale, bias, self.eps)


def layer_norm(eps, dtype, name):
  # The two-pass variance: E[x^2] - E[x]^2 loses all digits far from zero.
  if on_cpu(dtype):
    return LayerNorm(eps, name=name)
  return nn.LayerNorm(eps, dtype=dtype, use_fast_variance=False, name=name)


def linear(features, dtype, **kwargs):
  """`nn.Dense` in every respect; its product is `dense` on a CPU."""
  if on_cpu(dtype):
    kwargs["dot_general"] = lambda x, kernel, *_, **__: dense(x, kernel)
  return nn.Dense(features, dtype=dtype, **kwargs)
