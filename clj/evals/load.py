"""A trained run at work: `clj.load`, and its evaluation without the training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from clj import augment as augmentation
from clj import sharding
from clj.cli import UserError
from clj.data import images, open_data
from clj.data.dataset import data_of_run
from clj.evals.measure import make_evaluate, table
from clj.evals.rows import is_picture
from clj.methods import make_method
from clj.runs import checkpoint, workdir


class Loaded(NamedTuple):
  """A trained method at work.

  embed: `(params, extra, batch) -> dict of arrays [B, ...]`, "features" among them.
  preprocess: a list of file names, bytes, PIL pictures or uint8 arrays `[H, W, 3]` ->
    batch, of the first column of pictures; None where there is none.
  tokenize: a list of texts -> batch, of the first column of texts, by the vocabulary
    that the run was trained with; or None. tokenizer: that one, or None.
  config: what it was trained with. step: of the checkpoint.
  columns: those of the run, by name.
  inputs: by column, a list of values as a data set has them -> batch.
  """

  embed: Callable
  params: Any
  extra: Any
  preprocess: Callable | None
  tokenize: Callable | None
  tokenizer: Any
  config: dict
  step: int
  columns: dict
  inputs: dict[str, Callable]


def load(directory, step: int | None = None, mesh: Mesh | None = None) -> Loaded:
  """Loads the newest intact checkpoint of a workdir, or that of `step`.

    model = clj.load("runs/simclr-demo")
    batch = model.preprocess(["one.jpg", "two.png"])
    features = model.embed(model.params, model.extra, batch)["features"]

  Where pictures and texts were trained together, both have a place in one space:

    text = model.tokenize(["a red star"])
    z = model.embed(model.params, model.extra, batch | text)
    cosine = losses.l2_normalize(z["image"]) @ losses.l2_normalize(z["text"]).T

  Parameters lie on the first device, or split over `mesh` by the rules of the config;
  of the optimiser's state nothing is read.

  Raises UserError or CheckpointError, one line, where there is none.
  """
  config = workdir.read_config(directory)
  checkpoints = checkpoint.Checkpoints(directory)
  if step is None:
    intact = (s for s in checkpoints.steps()[::-1] if checkpoints.fault(s) is None)
    if (step := next(intact, None)) is None:
      raise checkpoint.CheckpointError(f"{directory} has no intact checkpoint")
  rules = config["mesh"].get("rules", ())

  def placed(name, leaf):
    return NamedSharding(mesh, sharding.spec(leaf, name, mesh.shape["fsdp"], rules))

  state = checkpoints.restore_tree(
    step, placed if mesh is not None else None, parts=("params", "extra")
  )
  columns = data_of_run(config["data"], directory).columns
  _check_saved(columns, checkpoints.clock(step).get("columns", {}), directory)
  method = make_method(config["method"], config["model"], config["total_steps"])
  texts = [name for name, c in columns.items() if c.tokenizer is not None]
  pictures = [name for name, c in columns.items() if is_picture(c)]
  inputs = {name: functools.partial(_inputs, c) for name, c in columns.items()}
  return Loaded(
    jax.jit(method.embed),
    state["params"],
    state.get("extra", {}),
    (lambda x: inputs[pictures[0]](map(_pixels, x))) if pictures else None,
    (lambda x: inputs[texts[0]](_several(x))) if texts else None,
    columns[texts[0]].tokenizer if texts else None,
    config,
    step,
    columns,
    inputs,
  )


def _check_saved(columns: dict, saved: dict, directory):
  for name, value in saved.items():
    if name in columns and columns[name].saved != value:
      raise UserError(
        f"{directory} was trained with another vocabulary of data.columns.{name} than "
        "the one that lies there now"
      )


def _inputs(column, values) -> dict:
  batch = column.rows([column.test(value) for value in values])
  return augmentation.to_float({key: jnp.asarray(x) for key, x in batch.items()})


def _several(texts) -> list[str]:
  return [texts] if isinstance(texts, str) else list(texts)


def _pixels(picture):
  if isinstance(picture, np.ndarray | bytes):
    return picture
  if isinstance(picture, Image.Image):
    return images.from_pillow(picture)
  return epath.Path(picture).read_bytes()


def evaluate_alone(directory, step: int | None = None, names: str | None = None) -> str:
  """Evaluates a checkpoint of a run, its parameters split as in training; a table.

  names: of evaluations, such as "knn,linear_probe"; None: those of the config.
  """
  config = workdir.read_config(directory)
  evals = config["evals"]
  if names:
    evals = {name: evals.get(name, {}) for name in names.split(",")}
  mesh = sharding.of_config(config["mesh"])
  sharding.check_batch_size(config["batch_size"], mesh)
  with jax.set_mesh(mesh):
    model = load(directory, step, mesh)
    evaluate = make_evaluate(
      model.embed,
      augmentation.make(config["data"].get("augment", {})),
      open_data(config["data"], workdir=directory, started=True),
      evals=evals,
      batch_size=config["batch_size"],
      start="before" if config.get("init_from") else "untrained",
    )
    metrics = evaluate(model.params, model.extra, model.step, final=True)
  return f"{directory}, step {model.step}\n" + table(metrics, evals)
