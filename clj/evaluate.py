"""Evaluating a method's features: inside the loop, alone, and in a notebook.

    python -m clj.evaluate --workdir=DIR [--evals=knn,linear_probe] [--step=N]

The training and the test split are embedded once, split over all devices, and every
evaluation of the config's section `evals` gets the same features.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from clj import augment, checkpoint, log, sharding, workdir
from clj.data import images, pipeline, sources
from clj.evals import EVALS, NEEDS_LABELS, diagnostics
from clj.evals.knn import color_histogram, raw_pixels
from clj.methods import make_method


def never() -> bool:
  return False


def embed_source(
  embed: Callable, source, *, size: int, batch_size: int, stopping=never
) -> dict | None:
  """Embeds every record of a source, in the mesh of the context.

  embed: `batch -> dict of arrays [B, d]`; batch["image"] is uint8 `[B, 1, S, S, 3]`.
  Returns a dict of arrays `[N', d]`, split over the devices, with "label" and "index"
  `[N']`: -1 in rows that only fill up the last batch. The order of the rows is not that
  of the records; "index" has it. None if `stopping()` on the way.
  """
  mesh = jax.sharding.get_mesh()
  # Rounded up to what all devices share; a small training batch would waste their time.
  batch_size = -(-max(batch_size, 512) // mesh.size) * mesh.size
  rows = sharding.process_rows(batch_size, mesh)
  parts = []
  for batch in pipeline.eval_batches(
    source, batch_size=batch_size, rows=rows, size=size
  ):
    if stopping():
      return None
    batch.setdefault("label", np.full(len(batch["index"]), -1, np.int32))
    batch = sharding.to_global(batch, mesh)
    parts.append(embed(batch) | {k: batch[k] for k in ("label", "index")})
  return {key: _join(*(part[key] for part in parts)) for key in parts[0]}


@jax.jit  # here, so that later evaluations find it compiled
def _join(*parts):
  """Batches `[B, ...]` -> `[B * batches, ...]`; each row stays where it was made."""
  joined = jnp.stack(parts, axis=1)
  return joined.reshape(-1, *joined.shape[2:])


def make_evaluate(
  embed: Callable, augment_views, train_source, *, data, evals, batch_size
):
  """Builds the evaluation of a config.

  embed: a method's `embed`. augment_views: the augmentation of its training.
  train_source: the source of the training split. data, evals: sections of the config.

  Returns `evaluate(params, extra, step, final, writer=None, stopping=never)`. It gives
  metrics by name, such as "eval/knn/top1", or None if it was stopped. At step 0 come
  baselines by the protocol of kNN: the untrained network, and for pictures in memory
  their pixels, the same mean-centred, their colour histogram, and chance. With `final`
  the evaluations run too that have `final_only`.
  """
  if not evals:
    return lambda *_, **__: {}
  for label, options in evals.items():
    if (name := options.get("name", label)) not in EVALS:
      raise ValueError(f"no evaluation {name!r}; there are: {', '.join(EVALS)}")
  if not train_source.class_names:  # such as a folder without class sub-folders
    named = {label: options.get("name", label) for label, options in evals.items()}
    evals = {k: v for k, v in evals.items() if named[k] not in NEEDS_LABELS}
  test_source = sources.open_source(
    data["source"], data["test_split"], data["data_dir"] or None
  )
  splits = {"train": train_source, "test": test_source}
  classes = len(train_source.class_names or ())

  @jax.jit
  def features(params, extra, batch):
    return embed(params, extra, augment.to_float(batch))

  @jax.jit
  def of_views(params, extra, batch):
    views = augment_views(jax.random.key(0), batch)["image"]
    pair = [embed(params, extra, {"image": views[:, v : v + 1]}) for v in range(2)]
    filled = min(batch_size, len(test_source))  # the rest only fills up the batch
    return tuple(found["features"][:filled] for found in pair)

  def embed_splits(embed, stopping):
    found = {}
    for split, source in splits.items():
      found[split] = embed_source(
        embed, source, size=data["size"], batch_size=batch_size, stopping=stopping
      )
      if found[split] is None:
        return None
    return found

  def evaluate(params, extra, step, final, writer=None, stopping=never):
    found = embed_splits(lambda batch: features(params, extra, batch), stopping)
    if found is None:
      return None
    if data["views"] > 1:
      found["test"]["views"] = views_of_test(params, extra)
    metrics = {"eval/records": float(len(test_source))}
    for label, options in evals.items():
      kwargs = dict(options)
      run = EVALS[name := kwargs.pop("name", label)]
      if kwargs.pop("final_only", False) and not final:
        continue
      values = run(found["train"], found["test"], classes, **kwargs)
      # At step 0 the untrained network may well look collapsed.
      if name == "diagnostics" and step and (line := diagnostics.warning(values)):
        print(line, flush=True)
      metrics |= {f"eval/{label}/{key}": value for key, value in values.items()}
    if step == 0 and "eval/knn/top1" in metrics:
      metrics["eval/knn/untrained"] = metrics["eval/knn/top1"]
      if train_source.arrays is not None:  # pixels of photographs say nothing
        found = baselines(stopping)
        if found is None:
          return None
        metrics |= found
    elif writer is not None and jax.process_count() == 1:
      picture = _neighbours(found["train"], found["test"], splits, data["size"])
      writer.picture("neighbours", picture, step)
    return metrics

  def views_of_test(params, extra):
    mesh = jax.sharding.get_mesh()
    rows = sharding.process_rows(batch_size, mesh)
    batches = pipeline.eval_batches(
      test_source, batch_size=batch_size, rows=rows, size=data["size"]
    )
    return of_views(params, extra, sharding.to_global(next(iter(batches)), mesh))

  def baselines(stopping):
    kwargs = {k: v for k, v in evals["knn"].items() if k not in ("name", "layer")}

    def knn(found):
      return EVALS["knn"](found["train"], found["test"], classes, **kwargs)["top1"]

    def of_pictures(describe):
      embed = lambda b: {"features": describe(augment.to_float(b)["image"][:, 0])}
      return embed_splits(jax.jit(embed), stopping)

    metrics = {}
    if (found := of_pictures(color_histogram)) is None:
      return None
    metrics["eval/knn/color_histogram"] = knn(found)
    if (found := of_pictures(raw_pixels)) is None:
      return None
    metrics["eval/knn/raw_pixels"] = knn(found)
    weight = (found["train"]["index"] >= 0)[:, None]
    mean = (found["train"]["features"] * weight).sum(0, keepdims=True) / weight.sum()
    for split in found.values():
      split["features"] = split["features"] - mean
    metrics["eval/knn/centered_pixels"] = knn(found)
    counts = np.bincount(test_source.arrays["label"] + 1)[1:]
    metrics["eval/knn/chance"] = float(counts.max() / counts.sum())
    return metrics

  return evaluate


def _neighbours(train: dict, test: dict, splits, size: int, rows=8, columns=8):
  """A picture: some test records, and to the right of each its nearest in training."""
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
  first = jnp.argsort(jnp.where(test["index"] < 0, 2**31 - 1, test["index"]))[:rows]
  similarity = unit(test["features"][first]) @ unit(train["features"]).T
  similarity = jnp.where(train["index"][None] >= 0, similarity, -2.0)
  _, near = jax.lax.top_k(similarity, columns)
  picked = np.asarray(train["index"])[np.asarray(near)]
  records = np.asarray(test["index"][first])
  pictures = [
    np.concatenate(
      [
        _pictures(splits["test"], records[r : r + 1], size),
        _pictures(splits["train"], picked[r], size),
      ]
    )
    for r in range(len(records))
    if records[r] >= 0
  ]
  return log.grid(np.stack(pictures))


def _pictures(source, records, size: int) -> np.ndarray:
  if source.arrays is not None:
    pictures = source.arrays["image"][records]
    return np.stack([images.crop_centrally(picture, size) for picture in pictures])
  return np.stack(
    [
      images.crop_centrally(images.decode(record["image"]), size)
      for record in source.read(records)
    ]
  )


def best_metric(evals: dict) -> str | None:
  """The metric whose highest value marks the best checkpoint."""
  named = (f"eval/{label}/top1" for label in evals if label in ("knn", "linear_probe"))
  return next(named, None)


def summary(directory) -> str:
  """The last evaluation of a run as a table, the baselines beside it."""
  config = workdir.read_config(directory)
  return "\n" + _table(log.last_values(directory, "eval/"), config["evals"])


def _table(values: dict[str, float], evals: dict) -> str:
  """Metrics "eval/LABEL/..." with the protocol of each evaluation beside the first."""
  rows = []
  for label, options in evals.items():
    shown = {"layer": "features"} | options
    protocol = ", ".join(f"{k} {v}" for k, v in shown.items() if k != "name")
    for key in sorted(k for k in values if k.startswith(f"eval/{label}/")):
      rows.append((key.removeprefix("eval/"), f"{values[key]:.4f}", protocol))
      protocol = ""
  return log.table(rows, ("evaluation", "value", "protocol"))


class Loaded(NamedTuple):
  """A trained method at work.

  embed: `(params, extra, batch) -> dict of arrays [B, d]`, "features" among them.
  preprocess: a list of file names, bytes, PIL pictures or uint8 arrays `[H, W, 3]` ->
    batch. config: what it was trained with. step: of the checkpoint.
  """

  embed: Callable
  params: Any
  extra: Any
  preprocess: Callable
  config: dict
  step: int


def load(directory, step: int | None = None) -> Loaded:
  """Loads the newest intact checkpoint of a workdir, or that of `step`.

    model = clj.load("runs/simclr-demo")
    batch = model.preprocess(["one.jpg", "two.png"])
    features = model.embed(model.params, model.extra, batch)["features"]

  Raises ValueError or CheckpointError, one line, where there is none.
  """
  config = workdir.read_config(directory)
  checkpoints = checkpoint.Checkpoints(directory)
  if step is None:
    intact = (s for s in checkpoints.steps()[::-1] if checkpoints.fault(s) is None)
    if (step := next(intact, None)) is None:
      raise checkpoint.CheckpointError(f"{directory} has no intact checkpoint")
  state = checkpoints.restore_tree(step)
  method = make_method(config["method"], config["model"])
  size = config["data"]["size"]

  def preprocess(pictures):
    ready = np.stack([images.crop_centrally(_pixels(p), size) for p in pictures])
    return augment.to_float({"image": jnp.asarray(ready[:, None])})

  embed = jax.jit(method.embed)
  return Loaded(embed, state["params"], state["extra"], preprocess, config, step)


def _pixels(picture) -> np.ndarray:
  if isinstance(picture, np.ndarray):
    return picture
  if isinstance(picture, bytes):
    return images.decode(picture)
  if isinstance(picture, Image.Image):
    return images.from_pillow(picture)
  return images.decode(epath.Path(picture).read_bytes())


def main(argv=None) -> int:
  from clj.main import complain, quiet_libraries, user_errors

  parser = argparse.ArgumentParser(description="Evaluates a checkpoint of a run.")
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--evals", help="such as knn,linear_probe; default: the config's")
  arguments = parser.parse_args(argv)
  quiet_libraries()
  try:
    print(run(arguments.workdir, arguments.step, arguments.evals))
  except user_errors() as error:
    return complain(error)
  return 0


def run(directory, step: int | None, names: str | None) -> str:
  """Evaluates one checkpoint; returns a table."""
  from clj.train import make_augment

  config = workdir.read_config(directory)
  data, evals = config["data"], config["evals"]
  if names:
    evals = {name: evals.get(name, {}) for name in names.split(",")}
  model = load(directory, step)
  source = sources.open_source(
    data["source"], data["train_split"], data["data_dir"] or None
  )
  mesh = sharding.make_mesh(**config["mesh"])
  sharding.check_batch_size(config["batch_size"], mesh)
  with jax.set_mesh(mesh):
    params, extra = jax.device_put(
      (model.params, model.extra), sharding.replicated(mesh)
    )
    evaluate = make_evaluate(
      model.embed,
      make_augment(data),
      source,
      data=data,
      evals=evals,
      batch_size=config["batch_size"],
    )
    metrics = evaluate(params, extra, model.step, final=True)
  return f"{directory}, step {model.step}\n" + _table(metrics, evals)


if __name__ == "__main__":
  sys.exit(main())
