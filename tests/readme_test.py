"""The README's example runs as it stands, and gives the loss of the global batch."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from clj import losses

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_pmap_example_is_the_global_loss():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  names = {}
  exec(code, names)
  assert jax.local_device_count() == 8
  image, text = (
    losses.l2_normalize(x.reshape(-1, 16)) for x in (names["image"], names["text"])
  )
  expected = losses.clip(image, text, jnp.exp(jnp.float32(2.0)))
  np.testing.assert_allclose(names["loss"], expected, rtol=1e-6)


def test_files_that_the_readme_names_exist():
  for path in re.findall(
    r"`?((?:clj|configs|tests|benchmarks)/[\w/.]+)", README.read_text()
  ):
    if "foo" not in path:
      assert (README.parent / path.rstrip(".")).exists(), path
