"""Every method of clj: a name for configs -> the function that builds it."""

from clj.cli import UserError, check_keywords
from clj.method import Method, with_probe
from clj.methods import clip, simclr

METHODS = {
  "clip": clip.make,
  "simclr": simclr.make,
}


def make_method(method: dict, model: dict) -> Method:
  """The method that the sections `method` and `model` of a config describe.

  method: "name", a key of `METHODS`; "probe_classes", above 0 for an online linear
    probe; the rest are keyword arguments of the method's `make`.
  """
  kwargs = dict(method)
  name, classes = kwargs.pop("name"), kwargs.pop("probe_classes", 0)
  if name not in METHODS:
    raise UserError(f"no method {name!r}; there are: {', '.join(METHODS)}")
  check_keywords(METHODS[name], kwargs, "method")
  made = METHODS[name](model=model, **kwargs)
  return with_probe(made, classes) if classes else made
