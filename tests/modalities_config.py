"""Recipes for the tests of the modalities; data.source is given by flag."""

from clj.recipe import choose, differ, only
from configs import simclr

TWO = {"name": "views", "size": 64, "views": 2, "crop_scale": (0.14, 1.0)}
SIX = {"name": "views", "of": "image", "size": 32, "views": 6}


def get_config(variant=None):
  return choose(variant, text_pairs, signals, pictures, multi_crop)


def text_pairs():
  """Queries and their passages, of a table."""
  return {
    "batch_size": 16,
    "total_steps": 30,
    "log_every": 1,
    "checkpoint_every": 3,
    "method": {"name": "text_pairs"},
    "model": {"vocab": 128},
    "data": {
      "train_split": "train[:80%]",
      "test_split": "train[80%:]",
      "columns": {
        "query": {"kind": "text", "tokenizer": "words", "length": 8},
        "passage": {"kind": "text", "same_as": "query", "length": 16},
      },
    },
    "optim": {"name": "adamw", "learning_rate": 0.1},
    "evals": {"retrieval": {"query": "query", "bank": "passage", "ks": (1, 5)}},
  }


def signals():
  """Arrays of different lengths, of a table."""
  return differ(
    text_pairs(),
    {
      "total_steps": 4,
      "checkpoint_every": 0,
      "method": {"name": "signals"},
      "model": only(channels=6),
      "data": {
        "columns": only(
          signal={"kind": "array", "length": 32, "dtype": "float32"},
          label={"kind": "label", "field": "activity"},
        ),
      },
      "evals": only(knn={"k": 5, "layer": "signal"}, diagnostics={"layer": "signal"}),
    },
  )


def pictures():
  """SimCLR on a folder of pictures, without a class anywhere."""
  return differ(
    simclr.smoke(),
    {
      "data": {
        "train_split": "train[:80%]",
        "test_split": "train[80%:]",
        "columns": only(image={"kind": "image"}),
      },
      "evals": only(diagnostics={}),
    },
  )


def multi_crop():
  """2 x 64 and 6 x 32 pixels of each picture, cut by the host."""
  small = SIX | {"crop_scale": (0.05, 0.14)}
  return differ(
    pictures(),
    {
      "method": {"name": "multi_crop"},
      "model": only(grid=4),
      "data": {"augment": only(image=TWO, crops=small)},
    },
  )
