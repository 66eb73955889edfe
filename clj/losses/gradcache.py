"""Exact large batches on few devices: towers in chunks, the loss over all of them.

Gao, Zhang, Han, Callan, 2021, arXiv:2101.06983 ("GradCache"). A loss that couples the
batch is not the mean of the losses of its chunks, so gradients of micro-batches cannot
be averaged. The towers, however, treat examples apart: they run chunk by chunk without
keeping activations, the loss sees all embeddings, and the backward pass encodes each
chunk once more.
"""

import jax
import jax.numpy as jnp

from clj.losses import softmax


def encode_in_chunks(encode, inputs, chunk, *, rng=None, has_aux=False):
  """`encode(inputs)` with the activations of one chunk in memory at a time.

  encode: `inputs -> outputs`, or `(inputs, rng) -> outputs` where `rng` is given; it
    may close over parameters and is differentiated through them.
  inputs: an array or a pytree of arrays, each with the global batch of B rows first.
  chunk: rows in a chunk over all devices. It divides B, and the devices that split the
    batch divide it, so that every device does its share of every chunk and no input
    moves.
  rng: chunk i is encoded with `fold_in(rng, i)`, in both passes: dropout is the same in
    the recomputation, but not that of the whole batch encoded at once.
  has_aux: `encode` returns `(outputs, aux)`; aux comes back stacked by chunk,
    `[B / chunk, ...]`.

  Returns the outputs, B rows in the order of the inputs. Value and gradient are those
  of `encode(inputs)` for every encoder that treats rows apart. Batch normalisation does
  not: its statistics are those of each chunk, another function than that of the whole
  batch. Chunk i holds the rows i, i + k, i + 2k, ... for k = B / chunk.
  """
  sizes = {x.shape[0] for x in jax.tree.leaves(inputs)}
  if len(sizes) != 1:
    raise ValueError(f"inputs differ in their number of rows: {sorted(sizes)}")
  (B,) = sizes
  if chunk < 1 or B % chunk:
    raise ValueError(
      f"a batch of {B} does not divide into chunks of {chunk}; use a divisor of {B}"
    )
  axes, _ = softmax.placement(None)
  if axes:
    softmax.check_divides(chunk, softmax.devices(axes), axes, "chunk")
  k = B // chunk
  # The chunk's number comes from the inner axis: a device's rows stay where they are.
  # Reshaped to [k, chunk], each device would hold whole chunks and compute almost all.
  split = lambda x: x.reshape(chunk, k, *x.shape[1:]).swapaxes(0, 1)
  join = lambda x: x.swapaxes(0, 1).reshape(B, *x.shape[2:])

  @jax.checkpoint
  def run(i, x):
    return encode(x) if rng is None else encode(x, jax.random.fold_in(rng, i))

  out = jax.lax.map(lambda ix: run(*ix), (jnp.arange(k), jax.tree.map(split, inputs)))
  if has_aux:
    outputs, aux = out
    return jax.tree.map(join, outputs), aux
  return jax.tree.map(join, out)
