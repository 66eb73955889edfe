"""How fast an index is made and searched: `python -m benchmarks.search --workdir=RUN`.

Prints one JSON line a measurement.

  embed   pictures a second from a folder of PNGs, 32 pixels a side, with the model of
          --workdir (such as runs/clip-demo), its start and compilation left out
  search  seconds for exact neighbours among --rows random embeddings that the disk's
          cache has, in a process of its own, with its peak memory; beside them one
          product with all rows in memory
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from clj.data.shapes import compositions
from clj.index import build, find
from clj.index import store as index

COUNT = 16384  # pictures


def report(name, value, unit):
  print(json.dumps({"benchmark": "search", "name": name, "value": value, "unit": unit}))


def make_index(directory, format, rows, width, rows_per_shard=16384):
  parts = -(-rows // rows_per_shard)
  rng = np.random.default_rng(0)
  made = index.Index(directory, {"format": format, "parts": parts, "dim": width})
  sizes = []
  for part in range(parts):
    count = min(rows_per_shard, rows - part * rows_per_shard)
    z = rng.standard_normal((count, width), np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    columns = {name: [None] * count for name in index.COLUMNS}
    columns["id"] = [f"{part}/{i}" for i in range(count)]
    made.write(part, z, columns, {"images": count, "texts": 0})
    sizes.append(count)
  made.write_info(rows_of_parts={"images": sizes, "texts": [0] * parts})


def queries_of(count, width):
  z = np.random.default_rng(1).standard_normal((count, width), np.float32)
  return z / np.linalg.norm(z, axis=1, keepdims=True)


def searched(directory, count):
  """Seconds, and the peak of memory in MiB, of all and beyond the start's."""
  made = index.open_index(directory)
  queries = queries_of(count, made.info["dim"])
  before = peak_memory()
  seconds = []
  for _ in range(3):
    began = time.perf_counter()
    find.search(made, queries, 12)
    seconds.append(time.perf_counter() - began)
  return min(seconds), peak_memory(), peak_memory() - before


def peak_memory():
  """Of this program, in MiB; getrusage would count that of the process it came from."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def in_memory(directory, count):
  """The same of the plain way: all rows in one array, one product, a partial sort."""
  before = peak_memory()
  made = index.open_index(directory)
  parts = [np.load(made.file(part)) for part in made.there()]
  everything = np.concatenate(parts)
  queries = queries_of(count, made.info["dim"])
  seconds = []
  for _ in range(3):
    began = time.perf_counter()
    scores = queries @ everything.T
    near = np.argpartition(scores, -12, axis=1)[:, -12:]
    np.take_along_axis(scores, near, 1).sort(axis=1)
    seconds.append(time.perf_counter() - began)
  return min(seconds), peak_memory(), peak_memory() - before


WAYS = {"search": searched, "in memory": in_memory}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", help="of a run; without it only the search")
  parser.add_argument("--rows", type=int, default=1_000_000)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
  flags = parser.parse_args()
  if flags.child:
    way, out, count = flags.child
    print(json.dumps(WAYS[way](out, int(count))))
    return
  with tempfile.TemporaryDirectory() as directory:
    for format in index.FORMATS:
      out = os.path.join(directory, format)
      os.mkdir(out)
      make_index(out, format, flags.rows, flags.width)
      ways = ("search", "in memory") if format == "npy" else ("search",)
      for way, count in itertools.product(ways, (1, 16)):
        child = [sys.executable, "-m", "benchmarks.search", "--child", way, out]
        child.append(str(count))
        said = subprocess.run(child, check=True, capture_output=True, text=True).stdout
        seconds, peak, added = json.loads(said.splitlines()[-1])
        name = f"{way}, {format}, {flags.rows} x {flags.width}, {count} queries"
        report(name, round(seconds, 3), "s")
        report(f"{name}: memory", round(peak), "MiB")
        report(f"{name}: memory beyond the start's", round(added), "MiB")
    if flags.workdir:
      photos = pathlib.Path(directory) / "photos"
      photos.mkdir()
      for i, picture in enumerate(compositions("train", count=COUNT)["image"]):
        Image.fromarray(picture).save(photos / f"{i:05d}.png")
      seconds = {}
      for few in (COUNT // 8, COUNT):
        began = time.perf_counter()
        out = os.path.join(directory, f"of-{few}")
        source = f"folder:{photos}"
        build.build(flags.workdir, out, source=source, split=f"train[:{few}]")
        seconds[few] = time.perf_counter() - began
      few, all_of_them = seconds
      rate = (all_of_them - few) / (seconds[all_of_them] - seconds[few])
      report("embed", round(rate), "pictures/s")


if __name__ == "__main__":
  main()
