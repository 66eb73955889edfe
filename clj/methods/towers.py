"""Towers of several modalities that end in one joint space.

A tower is a network and what leads from its features into the space. Any set of named
ones will do: an image and a text, a query and a passage, six kinds of sensors. What two
modalities share is one tower, applied to the inputs of both.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clj import losses, optim
from clj.cli import UserError
from clj.models import Network

HEADS = ("linear", "affine", "none")


class Towers(NamedTuple):
  """Three pure functions; `name` is that of a tower, `inputs` are its network's.

  init: `(rng, {name: inputs}) -> (params, stats)`. Parameters are named "NAME/..." and
    "NAME_head/...", statistics `stats[NAME]`.
  encode: `(params, stats, name, inputs, rng) -> (h, z, stats[name])`, in training:
    features `[B, d]`, embeddings `[B, width]` of length 1, and the updated statistics.
  embed: `(params, stats, name, inputs) -> (h, z)`, in evaluation: statistics frozen, no
    dropout, and embeddings not normalised.
  """

  init: Callable
  encode: Callable
  embed: Callable


def make(
  networks: dict[str, Network],
  width: int,
  heads: dict[str, str],
  *,
  locked: str = "",
  micro_batch: int = 0,
) -> Towers:
  """Builds towers.

  Args:
    networks: a tower's name -> its network, inputs -> features `[B, d]`.
    width: of the joint space.
    heads: a tower's name -> "linear", "affine" (with a bias) or "none" (the features
      are in the space already).
    locked: a regular expression on names of parameters. A tower of which all match runs
      as in evaluation. See `stop_locked`.
    micro_batch: examples that are encoded at a time, over all devices (see
      `losses.encode_in_chunks`); 0: all. Not for towers with batch norm.
  """
  for name, head in heads.items():
    if head not in HEADS:
      raise UserError(
        f"method.{name}_head is {head!r}: use 'linear', 'affine' or 'none'"
      )

  def init(rng, inputs):
    params, stats = {}, {}
    for i, (name, network) in enumerate(networks.items()):
      rng_tower, rng_head = jax.random.split(jax.random.fold_in(rng, i))
      params[name], stats[name] = network.init(rng_tower, *inputs[name])
      if micro_batch and jax.tree.leaves(stats[name]) and not is_locked(params, name):
        raise UserError(
          f"method.micro_batch is {micro_batch}, but the {name} tower has batch norm, "
          "whose statistics are those of the whole batch: use 0, or another tower"
        )
      apply = functools.partial(network.apply, train=False)
      h, _ = jax.eval_shape(apply, params[name], stats[name], *inputs[name])
      if head := _init_head(rng_head, name, heads[name], h.shape[-1], width):
        params[f"{name}_head"] = head
    return params, stats

  def is_locked(params, name):
    """Whether all of a tower is."""
    names = jax.tree.leaves(optim.names({name: params[name]}))
    return all(optim.matches(locked, n) for n in names)

  def apply(params, stats, name, inputs, *, train, rng=None):
    h, updated = networks[name].apply(
      params[name], stats[name], *inputs, train=train, rng=rng if train else None
    )
    z, head = h, params.get(f"{name}_head", {})
    if "kernel" in head:
      z = z @ head["kernel"]
    if "bias" in head:
      z = z + head["bias"][None]
    return h, z, updated

  def encode(params, stats, name, inputs, rng):
    train = not is_locked(params, name)

    def run(inputs, rng):
      h, z, updated = apply(params, stats, name, inputs, train=train, rng=rng)
      return (h, losses.l2_normalize(z)), updated

    if not micro_batch:
      (h, z), updated = run(inputs, rng)
      return h, z, updated
    (h, z), _ = losses.encode_in_chunks(run, inputs, micro_batch, rng=rng, has_aux=True)
    return h, z, stats[name]

  def embed(params, stats, name, inputs):
    h, z, _ = apply(params, stats, name, inputs, train=False)
    return h, z

  return Towers(init, encode, embed)


def _init_head(rng, name, head, features, width) -> dict:
  if head == "none":
    if features != width:
      raise UserError(
        f"the {name} tower's features are {features} wide and method.width is "
        f"{width}; without a head they must be equal: set method.{name}_head"
      )
    return {}
  kernel = jax.random.normal(rng, (features, width)) / math.sqrt(features)
  bias = {"bias": jnp.zeros((width,))} if head == "affine" else {}
  return {"kernel": kernel, **bias}


def inputs(batch, keys) -> tuple[jax.Array, ...]:
  """`batch[key]` for every key; of pictures `[B, V, H, W, 3]` the first view."""
  arrays = (batch[key] for key in keys)
  return tuple(x[:, 0] if x.ndim == 5 else x for x in arrays)


def stop_locked(locked: str, params):
  """The same parameters; of those that `locked` matches no gradient is computed."""
  return jax.tree.map(
    lambda name, p: jax.lax.stop_gradient(p) if optim.matches(locked, name) else p,
    optim.names(params),
    params,
  )
