"""An entry point of clj, with the methods that only the tests have.

    python -m tests.run_with_method clj.main --config=tests/modalities_config.py:signals

What a method of one's own does by its line in `clj/methods/__init__.py` is done here
from outside, in this process and in those that it starts.
"""

import runpy
import sys

from clj.methods import METHODS
from clj.runs import processes
from tests import small_methods, text_pairs_method

OWN = {
  "text_pairs": text_pairs_method.make,
  "signals": small_methods.make_signals,
  "multi_crop": small_methods.make_multi_crop,
  "slip_in_code": small_methods.make_slip_in_code,
}


def main():
  METHODS.update(OWN)
  supervise = processes.supervise

  def supervise_this(command, patience):
    python, flag, *rest = command
    return supervise([python, flag, "tests.run_with_method", *rest], patience)

  processes.supervise = supervise_this
  module = sys.argv.pop(1)
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
