"""The mesh that is chosen for devices at hand, by estimate."""

import dataclasses

import jax
import pytest

from v4_jax import Config
from v4_jax.planning.estimates import HEADROOM
from v4_jax.planning.mesh_choice import Choice, Demand, device_memory, fewest_devices, largest_context, rank
from v4_jax.sharding.chips import CHIPS

FLASH = Demand(Config.flash(), 1 << 20, 1, "long-context", "native", "bfloat16")
V6E = "TPU v6e"


@pytest.fixture(scope="module")
def ranked():
    return rank(FLASH, V6E, 8)


def test_flash_on_eight_chips(ranked):
    """The mesh that the documentation advises; the order does not depend on the memory."""
    memory = CHIPS["v6e"].hbm_bytes
    best = ranked[0]
    assert best.mesh == {"data": 1, "seq": 1, "expert": 1, "tensor": 8} and best.fits(memory)
    assert 160e9 / 8 < best.needed < 25e9
    assert not best.fits(int(best.needed / (1 - HEADROOM)) - 10)
    assert [choice.mesh for choice in rank(FLASH, "a kind that nobody knows", 8)] == [one.mesh for one in ranked]


def test_wider_formats_take_more(ranked):
    wide = rank(dataclasses.replace(FLASH, dtype="float32", cache="float32"), V6E, 8)
    narrow = rank(dataclasses.replace(FLASH, dtype="bfloat16"), V6E, 8)
    assert wide[0].needed == 2 * narrow[0].needed > 6 * ranked[0].needed


def test_what_would_fit():
    memory = CHIPS["v5e"].hbm_bytes
    assert largest_context(FLASH, "TPU v5e", 8, memory) is None  # the weights alone are too much
    assert fewest_devices(FLASH, "TPU v5e", 8, memory) == 16
    many = dataclasses.replace(FLASH, rows=8)
    context = largest_context(many, V6E, 8, 30 * 10**9)
    assert context and context < FLASH.context
    for fits, length in ((True, context), (False, 2 * context)):
        choices = rank(dataclasses.replace(many, context=length), V6E, 8)
        assert fits == any(choice.fits(30 * 10**9) for choice in choices)


def test_memory():
    assert 0 < device_memory(jax.devices()) < 1 << 50
    assert Choice({}, 85).fits(100) and not Choice({}, 86).fits(100)
