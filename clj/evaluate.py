"""Evaluating a method's features: inside the loop, alone, and in a notebook.

    python -m clj.evaluate --workdir=DIR [--evals=knn,linear_probe] [--step=N]

The training and the test split are embedded once, split over all devices, and every
evaluation of the config's section `evals` gets the same features.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from clj import augment, cli, sharding
from clj.cli import UserError
from clj.data import images, pipeline, sources, text
from clj.evals import (
  BASELINES,
  EVALS,
  NEEDS_LABELS,
  NEEDS_TEXT,
  NEEDS_TRAIN,
  Task,
  diagnostics,
)
from clj.evals.knn import color_histogram, raw_pixels
from clj.evals.rows import fetch
from clj.methods import make_method
from clj.runs import checkpoint, log, workdir


class Stopped(Exception):
  """An evaluation was asked to stop on the way; it starts again after the restart."""


def never() -> bool:
  return False


def embed_source(
  embed: Callable,
  source,
  *,
  size: int,
  batch_size: int,
  crop: float = 0.875,
  stopping=never,
) -> dict:
  """Embeds the pictures of every record of a source, in the mesh of the context.

  embed: `batch -> dict of arrays [B, d]`; batch["image"] is uint8 `[B, 1, S, S, 3]`.
  size, crop: as in `images.crop_centrally`.
  Returns a dict of arrays `[N', d]`, split over the devices, with "label" and "index"
  `[N']`: -1 in rows that only fill up the last batch. The order of the rows is not that
  of the records; "index" has it. Raises Stopped if `stopping()` on the way.
  """
  mesh = jax.sharding.get_mesh()
  # Rounded up to what all devices share; a small training batch would waste their time.
  batch_size = -(-max(batch_size, 512) // mesh.size) * mesh.size
  rows = sharding.process_rows(batch_size, mesh)
  parts = []
  for batch in pipeline.eval_batches(
    source, batch_size=batch_size, rows=rows, size=size, crop=crop
  ):
    if stopping():
      raise Stopped
    batch.setdefault("label", np.full(len(batch["index"]), -1, np.int32))
    # Captions are embedded on their own: a picture may have several.
    batch = {k: v for k, v in batch.items() if k not in ("text", "text_mask")}
    batch = sharding.to_global(batch, mesh)
    parts.append(embed(batch) | {k: batch[k] for k in ("label", "index")})
  return {key: _join(*(part[key] for part in parts)) for key in parts[0]}


def embed_captions(
  embed: Callable, source, *, batch_size: int = 256, stopping=never
) -> dict:
  """Embeds every caption of a source, in the mesh of the context.

  embed: `batch -> dict of arrays [B, d]` of a batch of "text" and "text_mask".
  Returns a dict of arrays `[M', d]`, split over the devices, with "index" `[M']`, the
  record of each caption (-1 in rows that only fill up), and "tokens" `[M', L]`. Raises
  Stopped if `stopping()` on the way.
  """
  mesh = jax.sharding.get_mesh()
  batch_size = -(-batch_size // mesh.size) * mesh.size
  rows = sharding.process_rows(batch_size, mesh)
  parts = []
  for batch in pipeline.caption_batches(source, batch_size=batch_size, rows=rows):
    if stopping():
      raise Stopped
    batch = sharding.to_global(batch, mesh)
    said = {key: batch[key] for key in ("text", "text_mask")}
    parts.append(embed(said) | {"index": batch["index"], "tokens": batch["text"]})
  return {key: _join(*(part[key] for part in parts)) for key in parts[0]}


def embed_texts(
  embed: Callable, tokenizer, texts, *, batch_size: int = 256, stopping=never
) -> dict:
  """Embeds texts: arrays `[n, d]` by name, on every host.

  Raises Stopped if `stopping()` on the way.
  """
  mesh = jax.sharding.get_mesh()
  batch_size = -(-batch_size // mesh.size) * mesh.size
  first, stop = sharding.process_rows(batch_size, mesh)
  ids, mask, _ = tokenizer.encode(texts)
  pad = [(0, -len(ids) % batch_size), (0, 0)]
  ids, mask = np.pad(ids, pad, constant_values=tokenizer.pad_id), np.pad(mask, pad)
  parts = []
  for start in range(0, len(ids), batch_size):
    if stopping():
      raise Stopped
    mine = slice(start + first, start + stop)
    batch = sharding.to_global({"text": ids[mine], "text_mask": mask[mine]}, mesh)
    parts.append({key: fetch(z) for key, z in embed(batch).items()})
  return {
    key: np.concatenate([part[key] for part in parts])[: len(texts)] for key in parts[0]
  }


@jax.jit  # here, so that later evaluations find it compiled
def _join(*parts):
  """Batches `[B, ...]` -> `[B * batches, ...]`; each row stays where it was made."""
  joined = jnp.stack(parts, axis=1)
  return joined.reshape(-1, *joined.shape[2:])


def make_evaluate(
  embed: Callable,
  augment_views,
  train_source,
  *,
  data,
  evals,
  batch_size,
  start="untrained",
):
  """Builds the evaluation of a config.

  embed: a method's `embed`. augment_views: the augmentation of its training.
  train_source: the source of the training split. data, evals: sections of the config.
  An evaluation is on the data set of the section `data`, unless it has a section "data"
  of its own, whose keys take the place of those: {"source": ..., "test_split": ...}.
  start: what step 0 is called, see below.

  Returns `evaluate(params, extra, step, final, writer=None, stopping=never)`. It gives
  metrics by name, such as "eval/knn/top1", or None if it was stopped. At step 0 come
  baselines: "eval/knn/untrained" and its like, the same evaluation before training
  ("before" in the place of "untrained" where the weights were there already); and by
  the protocol of kNN, for pictures in memory, their pixels, the same mean-centred,
  their colour histogram, and chance. With `final` the evaluations run too that have
  `final_only`.

  Raises ValueError for an evaluation that does not exist or cannot be.
  """
  if not evals:
    return lambda *_, **__: {}
  opened = {"train": train_source}
  plans = {
    label: plan
    for label, options in evals.items()
    if (plan := _plan(label, options, data, opened)) is not None
  }

  @jax.jit
  def features(params, extra, batch):
    return embed(params, extra, augment.to_float(batch))

  @jax.jit
  def of_texts(params, extra, batch):
    return embed(params, extra, batch)

  @functools.partial(jax.jit, static_argnums=3)
  def of_views(params, extra, batch, filled):
    views = augment_views(jax.random.key(0), batch)["image"]
    pair = [embed(params, extra, {"image": views[:, v : v + 1]}) for v in range(2)]
    return tuple(found["features"][:filled] for found in pair)

  def embed_split(embed, source, data, stopping):
    return embed_source(
      embed,
      source,
      size=data["size"],
      crop=data.get("eval_crop", 0.875),
      batch_size=batch_size,
      stopping=stopping,
    )

  def evaluate(*args, **kwargs):
    with contextlib.suppress(Stopped):
      return measure(*args, **kwargs)

  def measure(params, extra, step, final, writer=None, stopping=never):
    cache = {}
    of_picture = lambda batch: features(params, extra, batch)
    of_text = lambda batch: of_texts(params, extra, batch)

    def embedded(source, data):
      """Every source once for all evaluations."""
      if id(source) not in cache:
        cache[id(source)] = embed_split(of_picture, source, data, stopping)
      return cache[id(source)]

    metrics = {}
    for label, plan in plans.items():
      if plan.final_only and not final:
        continue
      train = plan.train and embedded(plan.train, plan.data)
      test = embedded(plan.test, plan.data)
      if plan.name == "diagnostics" and data["views"] > 1:
        test = test | {"views": views_of(plan, params, extra)}
      task = Task(
        plan.test.name,
        plan.test.class_names or (),
        lambda texts: embed_texts(
          of_text, train_source.tokenizer, texts, stopping=stopping
        ),
        lambda source=plan.test: embed_captions(of_text, source, stopping=stopping),
      )
      values = EVALS[plan.name](train, test, task, **plan.options)
      # At step 0 the untrained network may well look collapsed.
      if plan.name == "diagnostics" and step and (line := diagnostics.warning(values)):
        print(line, flush=True)
      metrics["eval/records"] = float(len(plan.test))
      metrics |= {f"eval/{label}/{key}": value for key, value in values.items()}
    if step == 0:
      for label in plans:
        for key, name in BASELINES.items():
          if (full := f"eval/{label}/{key}") in metrics:
            metrics[f"eval/{label}/{name.format(start)}"] = metrics[full]
    plan = plans.get("knn")
    if plan is None or "eval/knn/top1" not in metrics:
      return metrics
    # Pixels of photographs say nothing.
    if step == 0 and plan.train.arrays is not None:
      return metrics | baselines(plan, stopping)
    if step and writer is not None and jax.process_count() == 1:
      picture = _neighbours(
        cache[id(plan.train)], cache[id(plan.test)], plan, plan.data["size"]
      )
      writer.picture("neighbours", picture, step)
    return metrics

  def views_of(plan, params, extra):
    mesh = jax.sharding.get_mesh()
    rows = sharding.process_rows(batch_size, mesh)
    batches = pipeline.eval_batches(
      plan.test, batch_size=batch_size, rows=rows, size=plan.data["size"]
    )
    batch = sharding.to_global({"image": next(iter(batches))["image"]}, mesh)
    # The rest of the rows only fills up the batch.
    return of_views(params, extra, batch, min(batch_size, len(plan.test)))

  def baselines(plan, stopping):
    kwargs = {k: v for k, v in plan.options.items() if k != "layer"}
    task = Task(plan.test.name, plan.test.class_names, None, None)

    def knn(found):
      return EVALS["knn"](found["train"], found["test"], task, **kwargs)["top1"]

    def of_pictures(describe):
      embed = lambda b: {"features": describe(augment.to_float(b)["image"][:, 0])}
      found = {}
      for split in ("train", "test"):
        source = getattr(plan, split)
        found[split] = embed_split(jax.jit(embed), source, plan.data, stopping)
      return found

    metrics = {}
    metrics["eval/knn/color_histogram"] = knn(of_pictures(color_histogram))
    found = of_pictures(raw_pixels)
    metrics["eval/knn/raw_pixels"] = knn(found)
    weight = (found["train"]["index"] >= 0)[:, None]
    mean = (found["train"]["features"] * weight).sum(0, keepdims=True) / weight.sum()
    for split in found.values():
      split["features"] = split["features"] - mean
    metrics["eval/knn/centered_pixels"] = knn(found)
    counts = np.bincount(plan.test.arrays["label"] + 1)[1:]
    metrics["eval/knn/chance"] = float(counts.max() / counts.sum())
    return metrics

  return evaluate


class _Plan(NamedTuple):
  """One evaluation of a config, its data opened."""

  name: str
  options: dict
  final_only: bool
  data: dict
  train: Any  # a Source, or None where the evaluation does not need it
  test: Any


def _plan(label: str, options, data: dict, opened: dict) -> _Plan | None:
  """None where the data have no labels for it. opened: sources of `data`, by split."""
  options = dict(options)
  name, own = options.pop("name", label), options.pop("data", None)
  if name not in EVALS:
    raise UserError(f"no evaluation {name!r}; there are: {', '.join(EVALS)}")
  tokenizer = opened["train"].tokenizer
  if name in NEEDS_TEXT and tokenizer is None:
    raise UserError(f"evaluation {label!r} needs texts: the config has no data.text")
  if own:
    data = {**data, **own}
    if name != "retrieval":  # the only one that asks for captions
      data["text"] = None
    train = sources.open_config(data, "train_split") if name in NEEDS_TRAIN else None
    like = dataclasses.replace(
      train or opened["train"],
      class_names=train.class_names if train else None,
      tokenizer=tokenizer if name == "retrieval" else None,
    )
    test = sources.open_config(data, "test_split", like)
  else:
    train = opened["train"]
    if "test" not in opened:
      opened["test"] = sources.open_config(data, "test_split", train)
    test = opened["test"]
  if name in NEEDS_LABELS and "label" not in test.keys:
    return None
  final_only = options.pop("final_only", False)
  return _Plan(
    name, options, final_only, data, train if name in NEEDS_TRAIN else None, test
  )


def _neighbours(train: dict, test: dict, plan, size: int, rows=8, columns=8):
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
        _pictures(plan.test, records[r : r + 1], size),
        _pictures(plan.train, picked[r], size),
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
  best = {
    "zeroshot": "top1",
    "retrieval": "text_to_image/recall@10",
    "knn": "top1",
    "linear_probe": "top1",
  }
  named = (f"eval/{label}/{best[label]}" for label in best if label in evals)
  return next(named, None)


def summary(directory) -> str:
  """The last evaluation of a run as a table, the baselines beside it."""
  config = workdir.read_config(directory)
  return "\n" + _table(log.last_values(directory, "eval/"), config["evals"])


def _table(values: dict[str, float], evals: dict) -> str:
  """Metrics "eval/LABEL/..." with the protocol of each evaluation beside the first."""
  rows = []
  for label, options in evals.items():
    layer = {} if options.get("name", label) in NEEDS_TEXT else {"layer": "features"}
    shown = {k: v for k, v in (layer | options).items() if k != "name"}
    protocol = ", ".join(f"{k} {v}" for k, v in shown.items())
    for key in sorted(k for k in values if k.startswith(f"eval/{label}/")):
      rows.append((key.removeprefix("eval/"), f"{values[key]:.4f}", protocol))
      protocol = ""
  return log.table(rows, ("evaluation", "value", "protocol"))


class Loaded(NamedTuple):
  """A trained method at work.

  embed: `(params, extra, batch) -> dict of arrays [B, d]`, "features" among them.
  preprocess: a list of file names, bytes, PIL pictures or uint8 arrays `[H, W, 3]` ->
    batch. tokenize: a list of texts -> batch, for methods with a text tower, by the
    vocabulary that the run was trained with; else None. tokenizer: that one, or None.
    config: what it was trained with. step: of the checkpoint.
  """

  embed: Callable
  params: Any
  extra: Any
  preprocess: Callable
  tokenize: Callable | None
  tokenizer: Any
  config: dict
  step: int


def load(directory, step: int | None = None) -> Loaded:
  """Loads the newest intact checkpoint of a workdir, or that of `step`.

    model = clj.load("runs/simclr-demo")
    batch = model.preprocess(["one.jpg", "two.png"])
    features = model.embed(model.params, model.extra, batch)["features"]

  Where pictures and texts were trained together, both have a place in one space:

    text = model.tokenize(["a red star"])
    z = model.embed(model.params, model.extra, batch | text)
    cosine = losses.l2_normalize(z["image"]) @ losses.l2_normalize(z["text"]).T

  Raises ValueError or CheckpointError, one line, where there is none.
  """
  config = workdir.read_config(directory)
  checkpoints = checkpoint.Checkpoints(directory)
  if step is None:
    intact = (s for s in checkpoints.steps()[::-1] if checkpoints.fault(s) is None)
    if (step := next(intact, None)) is None:
      raise checkpoint.CheckpointError(f"{directory} has no intact checkpoint")
  state = checkpoints.restore_tree(step)
  method = make_method(config["method"], config["model"], config["total_steps"])
  data = config["data"]
  size, crop = data["size"], data.get("eval_crop", 0.875)
  tokenizer = None
  if data.get("text"):
    saved = text.load(epath.Path(directory) / "tokenizer")
    tokenizer = text.check(saved, data["text"])
    text.check_fingerprint(
      tokenizer, checkpoints.clock(step).get("tokenizer"), directory
    )

  def preprocess(pictures):
    ready = [images.crop_centrally(_pixels(p), size, crop) for p in pictures]
    return augment.to_float({"image": jnp.asarray(np.stack(ready)[:, None])})

  def tokenize(texts):
    ids, mask, _ = tokenizer.encode([texts] if isinstance(texts, str) else list(texts))
    return {"text": jnp.asarray(ids), "text_mask": jnp.asarray(mask)}

  return Loaded(
    jax.jit(method.embed),
    state["params"],
    state["extra"],
    preprocess,
    tokenize if tokenizer else None,
    tokenizer,
    config,
    step,
  )


def _pixels(picture) -> np.ndarray:
  if isinstance(picture, np.ndarray):
    return picture
  if isinstance(picture, bytes):
    return images.decode(picture)
  if isinstance(picture, Image.Image):
    return images.from_pillow(picture)
  return images.decode(epath.Path(picture).read_bytes())


def main(argv=None) -> int:
  parser = cli.parser("clj.evaluate", "Evaluates a checkpoint of a run.")
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
  parser.add_argument("--evals", help="such as knn,linear_probe; default: the config's")

  def action():
    arguments = parser.parse_args(argv)
    cli.quiet_libraries()
    print(run(arguments.workdir, arguments.step, arguments.evals))
    return 0

  return cli.guarded(action)


def run(directory, step: int | None, names: str | None) -> str:
  """Evaluates one checkpoint; returns a table."""
  from clj.train import make_augment

  config = workdir.read_config(directory)
  data, evals = config["data"], config["evals"]
  if names:
    evals = {name: evals.get(name, {}) for name in names.split(",")}
  model = load(directory, step)
  source = sources.open_config(data, "train_split")
  if model.tokenizer is not None:
    source = sources.tokenized(source, model.tokenizer)
  mesh = sharding.of_config(config["mesh"])
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
      start="before" if config.get("init_from") else "untrained",
    )
    metrics = evaluate(params, extra, model.step, final=True)
  return f"{directory}, step {model.step}\n" + _table(metrics, evals)


if __name__ == "__main__":
  sys.exit(main())
