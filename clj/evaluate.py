"""Evaluating a method's features: inside the loop, alone, and in a notebook.

    python -m clj.evaluate --workdir=DIR [--evals=knn,linear_probe] [--step=N]

The training and the test split are embedded once, sharded over all devices, and every
evaluation of the config's section `evals` gets the same features.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clj import augment, checkpoint, log, sharding, workdir
from clj.data import pipeline, sources
from clj.evals import EVALS


def embed_source(
  embed: Callable, source, *, size: int, batch_size: int, stopping=lambda: False
) -> dict | None:
  """Embeds every record of a source, in the mesh of the context.

  embed: `(batch) -> dict of arrays [B, d]`; batch["image"] is uint8 `[B, 1, S, S, 3]`.
  Returns a dict of arrays `[N', d]`, split over the devices, with "label" and "index"
  `[N']`: -1 in rows that only fill up the last batch. The order of the rows is not the
  order of the records; "index" has it. None if `stopping()` said so on the way.
  """
  mesh = jax.sharding.get_mesh()
  rows = sharding.process_rows(batch_size, mesh)
  parts = []
  for batch in pipeline.eval_batches(
    source, batch_size=batch_size, rows=rows, size=size
  ):
    if stopping():
      return None
    batch = sharding.to_global(batch, mesh)
    parts.append(embed(batch) | {k: batch[k] for k in ("label", "index")})

  # [batches, B, d] -> [B * batches, d] keeps each row where it was computed.
  @jax.jit
  def join(*arrays):
    joined = jnp.stack(arrays, axis=1)
    return joined.reshape(-1, *joined.shape[2:])

  return {key: join(*(part[key] for part in parts)) for key in parts[0]}


def make_evaluate(embed: Callable, train_source, *, data, evals, batch_size):
  """Builds the evaluation of a config.

  embed: a method's `embed`. train_source: the source of the training split.
  Returns `evaluate(params, extra, step, final, writer=None, stopping=...) -> metrics`,
  names such as "eval/knn/top1"; None if it was stopped. At step 0 the baselines of kNN
  come along: raw pixels, colour histogram, chance, and the untrained network.
  """
  if not evals:
    return lambda *_, **__: {}
  for label, options in evals.items():
    name = options.get("name", label)
    if name not in EVALS:
      raise ValueError(f"no evaluation {name!r}; there are: {', '.join(EVALS)}")
  test_source = sources.open_source(
    data["source"], data["test_split"], data["data_dir"]
  )
  classes = len(train_source.class_names or ())
  jitted = jax.jit(
    lambda params, extra, batch: embed(params, extra, augment.to_float(batch))
  )
  pictures = jax.jit(lambda batch: {"pixels": augment.to_float(batch)["image"][:, 0]})

  def embed_both(function, stopping):
    found = {}
    for split, source in {"train": train_source, "test": test_source}.items():
      found[split] = embed_source(
        function,
        source,
        size=data["size"],
        batch_size=batch_size,
        stopping=stopping,
      )
      if found[split] is None:
        return None
    return found

  def evaluate(params, extra, step, final, writer=None, stopping=lambda: False):
    found = embed_both(lambda batch: jitted(params, extra, batch), stopping)
    if found is None:
      return None
    metrics = {}
    for label, options in evals.items():
      kwargs = dict(options)
      run = EVALS[kwargs.pop("name", label)]
      if kwargs.pop("final_only", False) and not final:
        continue
      values = run(found["train"], found["test"], classes=classes, **kwargs)
      metrics |= {f"eval/{label}/{k}": v for k, v in values.items()}
    return metrics

  return evaluate
