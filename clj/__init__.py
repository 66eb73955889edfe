"""Contrastive and joint-embedding learning in JAX."""


def load(workdir, step=None, mesh=None):
  """A trained run at work in a notebook: see `clj.evals.load.load`."""
  # Late: `import clj.losses` needs nothing but JAX.
  from clj.evals.load import load

  return load(workdir, step, mesh)
