"""Settings: what is read is what is meant, what is written reads back, and what changes with the step."""

import re

import jax.numpy as jnp
import pytest
import yaml

from v4_jax.layers.stages import Stage
from v4_jax.train.schedules import attention, learning_rate, loss_weights, stage_at, trained_loss
from v4_jax.train.settings import Settings, SettingsError, describe, read_settings, write_settings

LEAST = {
    "run": "runs/a",
    "architecture": "config.json",
    "data": {"sources": [{"path": "texts"}]},
    "stages": [{"steps": 100, "length": 128, "rows": 4}],
}


@pytest.fixture
def read(tmp_path):
    """`read(*changes, field=value)`: settings from a file with the least there must be."""

    def call(*changes, **fields):
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(LEAST | fields))
        return read_settings(tmp_path / "settings.yaml", changes)

    return call


def test_defaults_are_the_reports(read):
    found = read()
    chosen = found.optimizer
    assert (chosen.momentum, chosen.rms, chosen.weight_decay) == (0.95, 0.18, 0.1)
    assert (chosen.beta1, chosen.beta2, chosen.eps) == (0.9, 0.95, 1e-20)
    assert (found.losses.mtp, found.losses.mtp_decay, found.losses.balance_speed) == (0.3, 0.1, 0.001)


def test_changes_win_over_the_file(read):
    found = read("optimizer.eps=1e-8", "stages.0.rows=8", "data.sources.0.weight=2.5", "mesh=seq=4,expert=2", "seed=3")
    assert found.optimizer.eps == 1e-8 and found.stages[0].rows == 8 and found.data.sources[0].weight == 2.5
    assert found.mesh == "seq=4,expert=2" and found.seed == 3


@pytest.mark.parametrize("text", ["1e-20", "1E-20", "1.0e-20"])
def test_numbers_as_people_write_them(read, text):
    """YAML 1.1 takes 1e-20 for a word."""
    assert read(f"optimizer.eps={text}").optimizer.eps == 1e-20


def test_what_is_written_reads_back(read, tmp_path):
    found = read("optimizer.warmup_steps=3", "log.profile=[2, 3]", "stability.spike=null")
    (tmp_path / "copy.yaml").write_text(write_settings(found))
    assert read_settings(tmp_path / "copy.yaml") == found


def test_every_field_is_explained():
    rows = list(describe())
    names = [name for name, _, _ in rows]
    assert len(set(names)) == len(names) and all(meaning.endswith(".") for _, _, meaning in rows)
    assert {"run", "data.sources.N.path", "stages.N.length", "optimizer.eps", "checkpoints.keep_every"} <= set(names)
    assert ("optimizer.eps", "1.0e-20") in [row[:2] for row in rows] and ("run", "required") in [
        row[:2] for row in rows
    ]


def test_all_that_is_wrong_is_said_at_once(read):
    with pytest.raises(SettingsError, match=r"policy is 'half': input should be 'float32'.*; unknown field speed; "):
        read("speed=3", "policy=half")


def test_a_place_inside_a_value(read):
    with pytest.raises(SettingsError, match=re.escape("seed.x: seed is 3, which has no fields")):
        read("seed=3", "seed.x=1")


def staged(**optimizer) -> Settings:
    stages = [
        {"steps": 10, "length": 128, "rows": 4, "attention": "dense"},
        {"steps": 5, "length": 128, "rows": 8, "attention": "indexer"},
        {"steps": 25, "length": 256, "rows": 8},
    ]
    return Settings.model_validate(LEAST | {"stages": stages, "optimizer": optimizer})


def test_the_learning_rate():
    """Linear up from the first step on, constant, cosine to a tenth."""
    rate = learning_rate(staged(learning_rate=0.1, warmup_steps=4, decay_steps=20))
    found = [float(rate(step)) for step in range(40)]
    assert found[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1]) and found[4:21] == pytest.approx([0.1] * 17)
    assert found[30] == pytest.approx(0.055) and found[39] == pytest.approx(0.01, rel=0.06)
    assert found[20:] == sorted(found[20:], reverse=True)


def test_a_constant_rate():
    assert [float(learning_rate(staged(learning_rate=0.1))(step)) for step in (0, 39)] == pytest.approx([0.1, 0.1])


def test_stages():
    settings = staged()
    assert settings.steps == 40
    assert [stage_at(settings, step) for step in (0, 9, 10, 14, 15, 39, 40, 99)] == [0, 0, 1, 1, 2, 2, 2, 2]
    dense, indexer, sparse = settings.stages
    assert [attention(stage) for stage in settings.stages] == [
        Stage(dense=True, indexer_loss=False),
        Stage(dense=True, indexer_loss=True),
        Stage(dense=False, indexer_loss=True),
    ]
    assert [trained_loss(stage) for stage in (dense, indexer, sparse)] == ["model", "indexer", None]


def test_loss_weights():
    """The MTP loss counts less once the rate falls, and only the indexer learns in its own stage."""
    settings = staged(decay_steps=20)
    dense, indexer, sparse = settings.stages
    early, late = (loss_weights(settings, sparse, jnp.int32(step)) for step in (19, 20))
    assert (early.model, float(early.mtp), early.balance, early.indexer) == (1.0, pytest.approx(0.3), 1e-4, 1.0)
    assert float(late.mtp) == pytest.approx(0.1)
    assert loss_weights(settings, dense, jnp.int32(0)).indexer == 0
    alone = loss_weights(settings, indexer, jnp.int32(12))
    assert (alone.model, alone.indexer) == (0, 1)
