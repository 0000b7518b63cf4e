"""Metrics sent to services: what modules of their interface are told, and that a run does not depend on them."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from v4_jax.train.metrics import Metrics, read_metrics
from v4_jax.train.settings import Settings
from v4_jax.train.trackers import Tracker, TrackerError, wanted


class Fake(ModuleType):
    """A package that notes its calls, as (name, arguments, named ones), and fails where it is told to."""

    def __init__(self, name):
        super().__init__(name)
        self.calls, self.fails = [], set()
        self.answers = {
            "init": SimpleNamespace(id="w1", **{f: self._call(f) for f in ("define_metric", "log", "finish")}),
            "start_run": SimpleNamespace(info=SimpleNamespace(run_id="m1")),
        }
        for function in {"wandb": ("init",), "mlflow": _MLFLOW}[name]:
            setattr(self, function, self._call(function))

    def _call(self, function):
        def call(*arguments, **named):
            self.calls.append((function, arguments, named))
            if function in self.fails:
                raise RuntimeError(f"{function} fails\nand more of it")
            return self.answers.get(function)

        return call

    def of(self, function):
        return [(arguments, named) for name, arguments, named in self.calls if name == function]


_MLFLOW = ("set_experiment", "start_run", "log_dict", "log_metrics", "end_run")


@pytest.fixture
def fakes(monkeypatch):
    made = {name: Fake(name) for name in ("wandb", "mlflow")}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(**made)


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "run").mkdir()
    return Settings.model_validate(
        {
            "run": str(tmp_path / "run"),
            "architecture": {},
            "data": {"sources": [{"path": "x"}]},
            "stages": [{"steps": 1, "length": 128, "rows": 1}],
            "optimizer": {"learning_rate": 0.1},
            "log": {"wandb": "project", "mlflow": "experiment"},
        }
    )


def tracked(settings, say=lambda text: None):
    services = [Tracker(service, settings, say) for service in wanted(settings)]
    return Metrics(settings.run, tensorboard=False, trackers=services)


def test_what_services_are_told(fakes, settings):
    with tracked(settings) as metrics:
        metrics.write(1, {"loss": 3.0, "grad": float("nan")})
        metrics.rewind(0)  # the file forgets; services are told twice, and not finished
        metrics.write(1, {"loss": 2.0})
    assert [named for _, named in fakes.mlflow.of("log_metrics")] == [{"step": 1}] * 2
    assert [told for (told,), _ in fakes.mlflow.of("log_metrics")] == [{"loss": 3.0}, {"loss": 2.0}]
    assert [told for (told,), _ in fakes.wandb.of("log")] == [{"step": 1, "loss": 3.0}, {"step": 1, "loss": 2.0}]
    assert (("*",), {"step_metric": "step"}) in fakes.wandb.of("define_metric")
    ((_, named),) = fakes.wandb.of("init")
    assert (named["project"], named["name"], named["id"]) == ("project", "run", None)
    (((written, _), _),) = fakes.mlflow.of("log_dict")
    assert written == named["config"] == settings.model_dump(mode="json")
    assert fakes.mlflow.of("set_experiment") == [(("experiment",), {})]
    assert len(fakes.wandb.of("finish")) == len(fakes.mlflow.of("end_run")) == 1
    with tracked(settings):  # goes on at the services, too
        assert fakes.wandb.of("init")[-1][1]["id"] == "w1" and fakes.mlflow.of("start_run")[-1][1]["run_id"] == "m1"
    assert len(fakes.mlflow.of("log_dict")) == 1


def test_a_service_that_fails_is_left_out(fakes, settings):
    said = []
    with tracked(settings, said.append) as metrics:
        fakes.mlflow.fails.add("log_metrics")
        for step in (1, 2):
            metrics.write(step, {"loss": 1.0})
    assert said == ["note: mlflow is left out from here on: log_metrics fails"]
    assert len(fakes.mlflow.of("log_metrics")) == 1 and len(fakes.wandb.of("log")) == 2
    assert read_metrics(settings.run / "metrics.jsonl")["step"].tolist() == [1, 2]


def test_a_service_that_does_not_take_the_run(fakes, settings):
    fakes.wandb.fails.add("init")
    with pytest.raises(TrackerError, match=r"^log\.wandb: init fails$"):
        tracked(settings)


def test_only_what_is_asked_for_is_imported(monkeypatch, settings):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        tracked(settings)
    plain = settings.model_copy(update={"log": type(settings.log)()})
    with tracked(plain) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert json.loads((settings.run / "metrics.jsonl").read_text())["loss"] == 1.0
