"""A workdir with the weights of a start, for tests of what is done with a run."""

import jax
import numpy as np

from clj.data import open_data
from clj.methods import make_method
from clj.runs import checkpoint, workdir

VIEWS = {"name": "views", "size": 32, "views": 2}
PICTURES_ALONE = {
  "source": "shapes",
  "test_split": "test[:256]",
  "columns": {"image": {"kind": "image"}, "label": {"kind": "label"}},
  "augment": {"image": VIEWS},
}
PAIRS = {
  "source": "shapes/compositions",
  "train_split": "train[:99]",
  "test_split": "test[:256]",
  "columns": {
    "image": {"kind": "image", "eval_crop": 1.0},
    "text": {"kind": "text", "field": "caption", "tokenizer": "words", "length": 16},
    "label": {"kind": "label"},
  },
  "augment": {"image": VIEWS | {"views": 1}},
}


def write_run(directory, config, data, method=None):
  """A workdir whose weights are those of a start, as `interop.convert` makes one."""
  config = config | {"data": data}
  opened = open_data(data, workdir=directory)
  batch = {key: np.zeros((2, *x.shape), x.dtype) for key, x in opened.spec.items()}
  if "image" in batch:
    batch["image"] = np.zeros((2, 2, 32, 32, 3), np.float32)
  method = method or make_method(config["method"], config["model"], 2)
  params, extra = jax.jit(method.init)(jax.random.key(config["seed"]), batch)
  workdir.record_config(directory, config, 0)
  checkpoints = checkpoint.Checkpoints(directory)
  state = {
    "params": params,
    "extra": extra,
    "opt_state": jax.tree.map(np.ones_like, params),
  }
  clock = {"seconds": 0.0, "columns": opened.saved}
  checkpoints.save(0, state, clock, {})
  checkpoints.close()
  return directory
