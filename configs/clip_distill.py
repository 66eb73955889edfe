"""CLIP that imitates the similarities of a larger CLIP, as open_clip distils.

    python -m clj.main --config=configs/clip_distill.py             # demo
    python -m clj.main --config=configs/clip_distill.py:VARIANT [--config.key=value ...]

variant  data                   hardware
demo     rendered compositions  two CPU cores; trains clip.py's demo, the teacher, first
smoke    rendered compositions  two steps at test size; the teacher knows nothing

`--show` prints a recipe whole. What we measured ourselves is in the README's table; the
keys of the student are explained in `demo` of `configs/clip.py`.
"""

from clj.recipe import choose, differ, only


def get_config(variant=None):
  return choose(variant, demo, smoke)


def demo():
  """A student of half the teacher's widths; the teacher is trained first."""
  return {
    "batch_size": 128,
    "total_steps": 450,
    "log_every": 20,
    "checkpoint_every": 200,
    "init_from": "configs/clip.py:demo",  # is trained first, in WORKDIR/first
    "init_rename": (
      (r"^params/(.*)", r"extra/teacher/params/\1"),
      (r"^extra/(.*)", r"extra/teacher/\1"),
    ),
    "method": {
      "name": "clip_distill",
      "width": 32,
      "weight": 1.0,  # of the distillation
      "teacher": {
        "width": 64,
        "model": {
          "image": {"name": "resnet_small", "widths": (24, 48, 96)},
          "text": {"name": "text_small", "vocab": 64, "depth": 0},
        },
      },
      "probe_classes": 0,
    },
    "model": {
      "image": {"name": "resnet_small", "widths": (12, 24, 48)},
      "text": {"name": "text_small", "vocab": 64, "depth": 0, "width": 32},
    },
    "data": {
      "source": "shapes/compositions",
      "columns": {
        "image": {"kind": "image", "eval_crop": 1.0},
        "text": {
          "kind": "text",
          "field": "caption",
          "tokenizer": "words",
          "length": 16,
        },
        "label": {"kind": "label"},
      },
      "augment": {
        "image": {
          "name": "views",
          "size": 32,
          "views": 1,
          "crop_scale": (0.9, 1.0),
          "flip": 0.0,
          "grayscale": 0.0,
        },
      },
    },
    "optim": {
      "name": "adamw",
      "learning_rate": 4e-3,
      "warmup_fraction": 0.05,
      "b2": 0.98,
      "weight_decay": 0.1,
    },
    "evals": {
      "zeroshot": {"templates": ("a {}", "{}")},
      "retrieval": {},
      "diagnostics": {},
    },
  }


def smoke():
  """The real path at test size: two steps on a few rendered shapes."""
  towers = {
    "image": {"name": "resnet_test", "dtype": "float32"},
    "text": {"name": "text_test", "vocab": 64},
  }
  return differ(
    demo(),
    {
      "batch_size": 16,
      "total_steps": 2,
      "log_every": 1,
      "checkpoint_every": 0,
      "init_from": "",
      "init_rename": (),
      "method": {"width": 16, "teacher": only(width=24, model=towers)},
      "model": towers,
      "data": {"train_split": "train[:512]", "test_split": "test[:256]"},
      "optim": only(name="adamw", learning_rate=1e-3, warmup_fraction=0.05),
      "evals": only(zeroshot={"templates": ("a {}",)}),
    },
  )
