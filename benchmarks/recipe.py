"""A config made ready to run step by step, as `clj.train.train` does it."""

import contextlib

import jax

from clj import sharding, train
from clj.data import pipeline, sources


class Recipe:
  """mesh, program (see `clj.train.build`), source, and `batch(step)` on the devices."""

  def __init__(self, config: dict, devices=None):
    self.config, self.data = config, config["data"]
    self.mesh = sharding.make_mesh(devices=devices)
    self.source = sources.open_source(
      self.data["source"], self.data["train_split"], self.data["data_dir"] or None
    )
    shapes = {
      key: jax.ShapeDtypeStruct(
        value.shape, value.dtype, sharding=sharding.batch_sharding(self.mesh)
      )
      for key, value in self.rows(0).items()
    }
    keys = ("seed", "batch_size", "total_steps", "method", "model", "data", "optim")
    with jax.set_mesh(self.mesh):
      self.program = train.build(shapes, self.mesh, **{k: config[k] for k in keys})

  def rows(self, step):
    with contextlib.closing(
      pipeline.batches(
        self.source,
        seed=self.config["seed"],
        batch_size=self.config["batch_size"],
        step=step,
        size=self.data["size"],
        views=self.data["views"],
        scale=self.data["crop_scale"],
        ratio=self.data["crop_ratio"],
      )
    ) as batches:
      return next(batches)

  def batch(self, step):
    return sharding.to_global(self.rows(step), self.mesh)
