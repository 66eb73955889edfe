"""A method that exists only here: queries and their passages, without any picture.

What a method of one's own takes: this file, a line in METHODS, a config. The embedding
of a text is the mean of those of its tokens.
"""

import jax
import jax.numpy as jnp

from clj import losses
from clj.method import Aux, Method, keep
from clj.methods.ids import text_ids

KEYS = {name: (name, f"{name}_mask") for name in ("query", "passage")}


def make(model, *, total_steps, width=8, temperature=0.1):
  """model: "vocab", the number of ids. total_steps: until half the temperature."""

  def init(rng, batch):
    del batch
    return {"token": 0.1 * jax.random.normal(rng, (model["vocab"], width))}, {}

  def bag(params, tokens, mask):
    rows = params["token"][tokens] * mask[..., None]
    return rows.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]

  def loss(params, extra, batch, rng, step):
    kept = jax.random.bernoulli(rng, 0.9, batch["query"].shape) & batch["query_mask"]
    h = bag(params, batch["query"], kept)
    passage = (batch["passage"], batch["passage_mask"])
    query, key = losses.l2_normalize(h), losses.l2_normalize(bag(params, *passage))
    tau = temperature * (1 - 0.5 * step / total_steps)
    value = losses.info_nce(query, key, tau, ids=text_ids(*passage))
    return value, (extra, Aux({"temperature": tau}, jax.lax.stop_gradient(h)))

  def embed(params, extra, batch):
    del extra
    known = {name: keys for name, keys in KEYS.items() if set(keys) <= batch.keys()}
    return {
      name: losses.l2_normalize(bag(params, *(batch[key] for key in keys)))
      for name, keys in known.items()
    }

  def limits(params):
    return dict.fromkeys(KEYS, params["token"].shape[0])

  needs = KEYS["query"] + KEYS["passage"]
  return Method(init, loss, keep, embed, needs, limits=limits)
