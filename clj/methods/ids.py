"""Which texts of a batch are the same one: an id for each."""

import chex
import jax
import jax.numpy as jnp


def text_ids(text, mask):
  """A 32-bit hash of the real tokens of every row: `[B, L]`, `[B, L]` -> int32 `[B]`.

  Equal texts have equal ids. Of two different ones that is expected once in four
  billion pairs, and all it does is to spare a negative.
  """
  chex.assert_equal_shape([text, mask])
  place = jnp.arange(text.shape[1], dtype=jnp.uint32)[None] * jnp.uint32(0x9E3779B9)
  x = jnp.where(mask, text + 1, 0).astype(jnp.uint32)
  x = _mix(x * jnp.uint32(0x85EBCA6B) ^ _mix(place))
  x = _mix(jnp.sum(jnp.where(mask, x, 0), axis=1, dtype=jnp.uint32))
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def _mix(x):
  """The finaliser of MurmurHash3: a bijection of 32 bits, every one to all."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
