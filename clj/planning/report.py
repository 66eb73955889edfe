"""A plan as text for people."""

from clj.runs import log


def size(count: float) -> str:
  for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
    if count >= scale:
      return f"{count / scale:.2f} {unit}"
  return f"{count / 1024:.1f} KiB"


def _span(pair, form="{:.3g}") -> str:
  low, high = (form.format(x) for x in sorted(pair))
  return low if low == high else f"{low} to {high}"


_HELD = {
  "parameters": "parameters",
  "optimiser": "optimiser state",
  "carried": "carried (statistics, teacher, queue)",
  "batch": "batch",
  "temporaries": "activations and other temporaries",
  "program": "program",
  "padding": "padding of tiles, results",
  "total": "total",
}


def describe(found: dict, name: str) -> str:
  """A plan of `step.examine` as text; name: of the config."""
  device = "chip"
  if found["devices"] != found["chips"]:
    device = "device (one of the two cores of a chip)"
  elif not found["kind"].startswith("TPU"):
    device = "device"
  mesh = " x ".join(f"{k} {v}" for k, v in found["mesh"].items())
  share = ""
  if found["needs"]:
    share = f": {100 * found['needs'] / found['hbm']:.0f} % of {size(found['hbm'])}"
  lines = [
    f"{name} on {found['topology']}: {found['chips']} chips of {found['kind']}, "
    f"{found['devices']} devices, {found['hosts']} hosts, mesh {mesh}",
    f"batch {found['batch_size']}, {found['batch_per_device']} a {device}; compiled in "
    f"{found['compile_s']:.0f} s",
    "",
    log.table(
      [(_HELD[k], size(v)) for k, v in found["memory"].items()],
      (f"memory of a {device}", ""),
    ),
    f"{'fits' if found['fits'] else 'DOES NOT FIT'}{share}",
  ]
  if not found["fits"]:
    lines.append(found.get("why", ""))
  if "flops" in found:
    lines += ["", *_work(found, device), "", parts_table(found), "", *_times(found)]
  return "\n".join(lines)


def _work(found, device):
  again = ""
  if found["recomputed_flops"]:
    share = 100 * found["recomputed_flops"] / found["flops"]
    again = f" ({share:.0f} % of it again, by jax.checkpoint)"
  rows = [
    (
      kind,
      one["count"],
      size(one["bytes"]),
      size(one["sent_bytes"]),
      _ms(one["seconds"]) if "seconds" in one else "",
    )
    for kind, one in found["collectives"].items()
  ]
  head = ("collectives a step", "count", "bytes", "sent at least", "time at least")
  lines = [
    f"FLOPs {found['flops']:.4g}{again}, memory traffic {size(found['hbm_bytes'])} a "
    f"step and {device}",
    "",
    log.table(rows, head),
  ]
  if None in found["loops"]:
    lines.append("a loop has no trip count in the program: its body counts once")
  return lines


def parts_table(found: dict) -> str:
  """The parts of a step side by side: which of them holds the others up.

  The last column is the part's share of the sum of the parts' bounds.
  """
  parts = found["parts"]
  bounds = {
    k: max(one["seconds"].values()) for k, one in parts.items() if "seconds" in one
  }
  whole = sum(bounds.values()) or 1.0
  rows = []
  for name, one in parts.items():
    sent = sum(kind["sent_bytes"] for kind in one["collectives"].values())
    row = (name, f"{one['flops']:.3g}", size(one["hbm_bytes"]), size(sent))
    if bounds:
      row += tuple(_ms(s) for s in one["seconds"].values())
      row += (one["bound"], f"{100 * bounds[name] / whole:.0f} %")
    rows.append(row)
  head = ("part of a step", "FLOPs", "memory traffic", "sent at least")
  if bounds:
    head += ("compute", "memory", "interconnect", "bound", "share")
  return log.table(rows, head)


def _times(found):
  if "seconds" not in found:
    return [f"no peaks are known of {found['kind']}: no times"]
  times = ", ".join(f"{k} {_ms(v)}" for k, v in found["seconds"].items())
  return [
    f"a step at the peaks: {times}; bound by {found['bound']}",
    f"images/s {_span(found['images_per_s'], '{:,.0f}')}, hours of the recipe "
    f"{_span(found['hours'])} (the three overlapped, and one after the other)",
    f"the input pipeline must give {found['images_per_s'][0]:,.0f} images/s, "
    f"{found['host_images_per_s']:,.0f} a host",
    f"peaks: {found['peaks']}",
  ]


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:.2f} ms"


def table(plans: list[dict]) -> str:
  """Plans side by side, in Markdown."""
  head = (
    "topology",
    "devices",
    "batch a device",
    "HBM a device",
    "of",
    "FLOPs a device",
    "compute, memory, interconnect (ms)",
    "bound",
    "images/s at most",
    "hours at least",
    "compiled in",
  )
  lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
  for one in plans:
    cells = [one["topology"], one["devices"], one["batch_per_device"]]
    cells[1] = f"{one['devices']}{' cores' if one['devices'] != one['chips'] else ''}"
    cells += [size(one["needs"]) if one["needs"] else "?", size(one["hbm"])]
    if "seconds" in one:
      cells += [
        f"{one['flops']:.3g}",
        ", ".join(f"{1e3 * s:.1f}" for s in one["seconds"].values()),
        one["bound"],
        f"{one['images_per_s'][0]:,.0f}",
        f"{one['hours'][0]:.2g}",
      ]
    else:
      cells += ["", "", "fits" if one["fits"] else "does not fit", "", ""]
    cells.append(f"{one['compile_s']:.0f} s")
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  return "\n".join(lines)
