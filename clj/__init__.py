"""Contrastive and joint-embedding learning in JAX."""


def load(workdir, step=None):
  """A trained run at work in a notebook: see `clj.evaluate.load`."""
  from clj.evaluate import load  # late: `import clj.losses` needs nothing but JAX

  return load(workdir, step)
