"""What the README shows runs as shown."""

import re
from pathlib import Path

import jax.numpy as jnp

from tests.conftest import DATA

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_example():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(example.replace("/mnt/disks/flash", str(DATA / "flash-tiny")), names)
    assert names["output"].logits.shape == (1, 1, 320)
    assert names["output"].cache.lengths.tolist() == [3]
    assert names["draft"].logits.shape == (1, 3, 320) and bool(jnp.isfinite(names["draft"].logits).all())


def test_every_command_exists():
    from v4_jax.commands import VERBS

    verbs = set(re.findall(r"v4-jax (\w+)", README))
    assert verbs <= set(VERBS)
    assert set(VERBS) <= set(re.findall(r"`(?:v4-jax )?(\w+)", README))


def test_every_file_named_exists():
    root = Path(__file__).parents[1]
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (root / "v4_jax" / name).is_file() or (root / name).is_file(), name
