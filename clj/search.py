"""Finds the nearest pictures, texts or whatever is in an index that `clj.embed` made.

    python -m clj.search --index=index --text "a red star" [--image=like.jpg] [--k=12]

How is in `clj.index.find`.
"""

import sys
from collections.abc import Sequence

from clj import cli


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser("clj.search", "Finds the nearest in an index.")
  parser.add_argument("--index", default="index", help="what clj.embed wrote")
  parser.add_argument("--text", action="append", default=[], help="may be repeated")
  parser.add_argument("--image", action="append", default=[], help="a file; likewise")
  parser.add_argument(
    "--column", help="of the run that --text stands for; default: the first of texts"
  )
  parser.add_argument("--k", type=int, default=12, help="neighbours of each")
  parser.add_argument(
    "--out", default="search.png", help='the grid of pictures; "": none'
  )
  parser.add_argument("--json", action="store_true", help="instead of a table")
  parser.add_argument(
    "--among", choices=("image", "text"), help="embeddings to look at"
  )
  parser.add_argument("--workdir", help="of the model, if it has moved")

  def action():
    arguments = parser.parse_args(argv)
    cli.quiet_libraries()
    from clj.index.find import find  # after the flags: JAX takes a second to load

    return find(arguments)

  return cli.guarded(action)


if __name__ == "__main__":
  sys.exit(main())
