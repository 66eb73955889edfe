"""A config made ready to run step by step, as `clj.train.train` does it."""

import contextlib

import jax

from clj import sharding, train
from clj.data import open_data


class Recipe:
  """mesh, program (see `clj.train.build`), data, and `batch(step)` on the devices."""

  def __init__(self, config: dict, devices=None):
    self.config, self.data = config, open_data(config["data"])
    self.mesh = sharding.make_mesh(devices=devices)
    keys = ("seed", "batch_size", "total_steps", "method", "model", "optim")
    with jax.set_mesh(self.mesh):
      self.program = train.build(
        train.batch_shapes(self.data, config["batch_size"], self.mesh),
        self.mesh,
        augment=config["data"]["augment"],
        **{k: config[k] for k in keys},
      )

  def rows(self, step):
    with contextlib.closing(
      self.data.batches(
        seed=self.config["seed"], batch_size=self.config["batch_size"], step=step
      )
    ) as batches:
      return next(batches)

  def batch(self, step):
    return sharding.to_global(self.rows(step), self.mesh)
