"""Multi-head attention without its projections, in the forms of `FORMS`.

Of queries `[N, T, H, d]`, keys and values `[N, S, H, d]` it makes `[N, T, H, d]`; the
softmax is in float32. `mask`, bool `[N, S]`, is True where a key may be looked at, None
for all of them; `causal` hides later tokens (T is S then).

"plain" is written out: the weight of every pair of tokens lies in memory. "flash" goes
over the keys in blocks and keeps no weights (arXiv:2205.14135): on a TPU JAX's Pallas
kernel "splash", on a GPU cuDNN's; on a CPU, which has none, it is the plain form.

Compiled for TPU v5e in bfloat16 the gradient of a whole tower reads and writes with the
kernel as much as without at 197 tokens, a tenth less at 256, 37 % less at 577, half at
729 and 39 % of it at 1024 (benchmarks/README.md); no TPU has timed it.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from clj import sharding
from clj.cli import UserError
from clj.models import dense

# Tokens, of the TPU kernel: of which it takes multiples; at most against each other, so
# that 577 are one block; and at most keys of a head on the chip.
LANES, BLOCK, HELD = 128, 640, 1920


def plain(q, k, v, mask=None, causal=False):
  seen = None if mask is None else mask[:, None, None]
  if causal:
    earlier = jnp.tril(jnp.ones((1, 1, q.shape[1], k.shape[1]), bool))
    seen = earlier if seen is None else seen & earlier
  if dense.on_cpu(q.dtype):
    q, k, v = (x.swapaxes(1, 2) for x in (_scaled(q), k, v))
    return _heads(q, k, v, seen).swapaxes(1, 2)
  # Scaled before, so that the scores are read as they are.
  scores = jnp.einsum("nthd,nshd->nhts", _scaled(q), k).astype(jnp.float32)
  if seen is not None:
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
  weights = nn.softmax(scores).astype(v.dtype)
  return jnp.einsum("nhts,nshd->nthd", weights, v)


# The same on CPU, of `[N, H, T, d]` and with little kept for the backward pass: XLA's
# products of transposed heads, and the softmax between them, are slow there.


def _batched(a, b, i, j):
  return lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))))


@jax.custom_vjp
def _heads(q, k, v, seen):
  return _heads_fwd(q, k, v, seen)[0]


def _heads_fwd(q, k, v, seen):
  scores = _batched(q, k, 3, 3)
  if seen is not None:
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
  weights = jnp.exp(scores - scores.max(-1, keepdims=True))  # but for their sum
  r = 1 / weights.sum(-1, keepdims=True)
  return _batched(weights, v, 3, 2) * r, (q, k, v, seen, weights, r)


def _heads_bwd(saved, g):
  q, k, v, seen, weights, r = saved
  along = _batched(g, v, 3, 3)
  mean = (weights * along).sum(-1, keepdims=True) * r
  scores = weights * ((along - mean) * r)
  if seen is not None:  # a row that sees nothing has weights too
    scores = jnp.where(seen, scores, 0.0)
  dq, dk = _batched(scores, k, 3, 2), _batched(scores, q, 2, 2)
  return dq, dk, _batched(weights, g * r, 2, 2), None


_heads.defvjp(_heads_fwd, _heads_bwd)


def flash(q, k, v, mask=None, causal=False):
  """The kernel of `sharding.platform()`, on each device's own examples.

  Decided while tracing: cuDNN's cannot be traced where there is no cuDNN.
  """
  platform = sharding.platform()
  if platform == "cpu":
    return plain(q, k, v, mask, causal)
  kernel = {"tpu": splash, "gpu": cudnn}[platform]
  return sharding.by_rows(partial(kernel, causal=causal), q, k, v, mask)


FORMS = {"plain": plain, "flash": flash}


def _scaled(q):
  """q / sqrt(d), without a second rounding."""
  return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _pad(x, tokens):
  return jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _block(tokens, count):
  """Tokens of each of `count` blocks that hold them all."""
  return -(-tokens // (count * LANES)) * LANES


def splash(q, k, v, mask=None, *, causal=False, interpret=False):
  """JAX's Pallas kernel for TPUs.

  interpret: run it as ordinary operations, on any platform; slow.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  (n, tokens, heads, _), keys = q.shape, k.shape[1]
  blocks = -(-tokens // BLOCK)
  rows = _block(tokens, blocks)
  parts = -(-keys // HELD)
  turns = -(-keys // (parts * BLOCK))
  columns = _block(keys, parts * turns)
  whole, held, all_keys = blocks * rows, turns * columns, parts * turns * columns
  if mask is None and all_keys > keys:
    mask = jnp.ones((n, keys), bool)
  # Keys that are on the chip as a whole are read once, and so is the gradient of their
  # queries written. Heads are narrower than the lanes of a register: laid out with the
  # tokens along these, arrays have no padding.
  sizes = kernels.BlockSizes(
    block_q=rows,
    block_kv=held,
    block_kv_compute=columns,
    block_q_dkv=rows,
    block_kv_dkv=held,
    block_kv_dkv_compute=columns,
    use_fused_bwd_kernel=True,
    q_layout=kernels.QKVLayout.SEQ_MINOR,
    k_layout=kernels.QKVLayout.SEQ_MINOR,
    v_layout=kernels.QKVLayout.SEQ_MINOR,
  )
  seen = (masks.CausalMask if causal else masks.FullMask)((whole, all_keys))
  kernel = kernels.make_splash_mha_single_device(
    masks.MultiHeadMask([seen] * heads), block_sizes=sizes, interpret=interpret
  )

  def one(q, k, v, mask):
    ids = None
    if mask is not None:  # queries see the keys of their number
      ids = kernels.SegmentIds(jnp.ones(whole, jnp.int32), mask.astype(jnp.int32))
    return kernel(q, k, v, segment_ids=ids)

  q = _pad(_scaled(q), whole)
  k, v = _pad(k, all_keys), _pad(v, all_keys)
  if mask is not None:
    mask = _pad(mask, all_keys)
  y = jax.vmap(one)(*(x.swapaxes(1, 2) for x in (q, k, v)), mask)
  return y.swapaxes(1, 2)[:, :tokens]


def cudnn(q, k, v, mask=None, *, causal=False):
  """cuDNN's kernel, which needs 16 bits and a head width that is a multiple of 8."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise UserError(
      f"flash attention on a GPU is cuDNN's, which has no {q.dtype}; "
      "use dtype='bfloat16' or attention='plain'"
    )
  # JAX takes an even number of tokens only, where there are gradients.
  tokens, keys = q.shape[1], k.shape[1]
  q, k, v = (_pad(x, x.shape[1] + x.shape[1] % 2) for x in (q, k, v))
  lengths = None
  if mask is not None:
    mask = _pad(mask, k.shape[1])[:, None, None]
    mask = jnp.broadcast_to(mask, (len(q), 1, q.shape[1], k.shape[1]))
  elif keys % 2:
    lengths = jnp.full(len(k), keys, jnp.int32)
  y = jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=mask,
    is_causal=causal,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )
  return y[:, :tokens]
