"""CLIP distilled from a larger CLIP, as open_clip does.

    python -m clj.main --config=configs/clip_distill.py      # demo, about 5 minutes
    python -m clj.main --config=configs/clip_distill.py:VARIANT [--config.key=value ...]

variant    data                   what it is
demo       rendered compositions  two CPU cores; trains the demo of clip.py first
smoke      rendered compositions  two steps at test size

To distil from weights of open_clip or Hugging Face, give `init_from` their safetensors
file, `method.teacher` their model, and `init_rename` as `clj/methods/clip_distill.py`
says. The keys that CLIP has too are explained in `demo` of `configs/clip.py`.
"""

from ml_collections import ConfigDict


def get_config(variant=None):
  variants = {"demo": demo, "smoke": smoke}
  if (variant or "demo") not in variants:
    raise ValueError(f"no variant {variant!r}; there are: {', '.join(variants)}")
  return ConfigDict(variants[variant or "demo"]()).lock()


def demo():
  """A student of half the teacher's widths; the teacher is trained first."""
  return {
    "seed": 0,
    "batch_size": 128,
    "total_steps": 450,
    "log_every": 20,
    "eval_every": 0,
    "checkpoint_every": 200,
    "init_from": "configs/clip.py:demo",  # the teacher, in WORKDIR/first
    "init_rename": (
      (r"^params/(.*)", r"extra/teacher/params/\1"),
      (r"^extra/(.*)", r"extra/teacher/\1"),
    ),
    "profile": "",
    "method": {
      "name": "clip_distill",
      "width": 32,  # of the student's joint space
      "teacher": {  # as it was trained
        "model": {
          "image": {"name": "resnet_small", "widths": (24, 48, 96)},
          "text": {"name": "text_small", "vocab": 64, "depth": 0},
        },
        "width": 64,
      },
      "weight": 1.0,  # of the distillation
      "mask_duplicates": True,
      "probe_classes": 0,
    },
    "model": {
      "image": {"name": "resnet_small", "widths": (12, 24, 48)},
      "text": {"name": "text_small", "vocab": 64, "depth": 0},
    },
    "data": {
      "source": "shapes/compositions",
      "train_split": "train",
      "test_split": "test",
      "data_dir": "",
      "threads": 0,
      "text": {"tokenizer": "words", "length": 16},
      "size": 32,
      "eval_crop": 1.0,
      "views": 1,
      "crop_scale": (0.9, 1.0),
      "crop_ratio": (3 / 4, 4 / 3),
      "augment": {"flip": 0.0, "grayscale": 0.0},
    },
    "optim": {
      "name": "adamw",
      "learning_rate": 4e-3,
      "warmup_fraction": 0.05,
      "b2": 0.98,
      "weight_decay": 0.1,
    },
    "mesh": {"data": -1, "fsdp": 1},
    "evals": {
      "zeroshot": {"templates": ("a {}", "{}")},
      "retrieval": {},
    },
  }


def smoke():
  """The real path at test size, its teacher untrained: two steps on a few shapes."""
  config = demo() | {"batch_size": 16, "total_steps": 2, "log_every": 1}
  config |= {"checkpoint_every": 0, "init_from": "", "init_rename": ()}
  towers = {
    "image": {"name": "resnet_test", "dtype": "float32"},
    "text": {"name": "text_test", "vocab": 64},
  }
  config["method"] |= {"width": 16, "teacher": {"model": towers, "width": 12}}
  config["model"] = towers
  config["data"] |= {"train_split": "train[:512]", "test_split": "test[:256]"}
  config["optim"] |= {"learning_rate": 1e-3}
  return config
