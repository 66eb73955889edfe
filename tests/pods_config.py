"""A run for the tests of several processes: short steps, hardly an evaluation."""

from configs import simclr


def get_config(variant=None):
  config = simclr.get_config("smoke")
  with config.unlocked():
    config.total_steps = 100_000
    config.log_every = 1
    config.checkpoint_every = 0
    config.evals = {}
    if variant == "evaluated":
      config.eval_every = 3
      config.evals = {"diagnostics": {}}
  return config
