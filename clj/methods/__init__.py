"""Every method of clj: a name for configs -> the function that builds it."""

from clj.methods import simclr

METHODS = {
  "simclr": simclr.make,
}
