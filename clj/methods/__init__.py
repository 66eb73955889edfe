"""Every method of clj: a name for configs -> the function that builds it."""

from clj.cli import UserError, check_keywords
from clj.method import Method, wise_ft, with_probe
from clj.methods import clip, clip_distill, simclr, slip

METHODS = {
  "clip": clip.make,
  "clip_distill": clip_distill.make,
  "simclr": simclr.make,
  "slip": slip.make,
}

# What `clip` once took as options.
MOVED = {
  "slip": "method.name='slip'",
  "distill": "method.name='clip_distill'",
  "average": "method.wise_ft",
}


def make_method(method: dict, model: dict, total_steps: int) -> Method:
  """The method that the sections `method` and `model` of a config describe.

  method: "name", a key of `METHODS`; "probe_classes", above 0 for an online linear
    probe; "wise_ft", a share of the trained weights that `embed` averages with those of
    the start, or None; the rest are keyword arguments of the method's `make`.
  total_steps: of the run, over which schedules of the method extend.
  """
  kwargs = dict(method)
  name, classes = kwargs.pop("name"), kwargs.pop("probe_classes", 0)
  share = kwargs.pop("wise_ft", None)
  if name not in METHODS:
    raise UserError(f"no method {name!r}; there are: {', '.join(METHODS)}")
  for key in kwargs.keys() & MOVED.keys():
    raise UserError(f"no key {key!r} in method; it is {MOVED[key]} now")
  for key in kwargs.keys() & {"model", "total_steps"}:
    raise UserError(f"no key {key!r} in method; it stands beside it in the config")
  check_keywords(METHODS[name], kwargs, "method")
  made = METHODS[name](model, total_steps=total_steps, **kwargs)
  made = made if share is None else wise_ft(made, share)
  return with_probe(made, classes) if classes else made
