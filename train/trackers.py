"""Services that keep the metrics of many runs: Weights & Biases, and MLflow, each imported only where it is asked for.

`RUN/metrics.jsonl` is what counts. A service that fails while a run goes on is told of and left out. A run that is
continued goes on at its services, too: their own names of it are kept beside the metrics. Steps that are taken again
after a spike come to a service twice, as neither forgets.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from v4_jax.files import complete
from v4_jax.train.settings import Settings

NAMES = "trackers.json"
SERVICES = ("wandb", "mlflow")


class TrackerError(ValueError):
    """A service that does not take a run; the sentence says why."""


class _Began(NamedTuple):
    """What a service has of a run.

    Attributes:
      id: its name of the run.
      log: `(metrics, step)`, told of each step that is logged.
      finish: called at the end.
    """

    id: str
    log: Callable[[dict[str, float], int], Any]
    finish: Callable[[], Any]


class Tracker:
    """One service's part of a run.

    Args:
      service: "wandb" or "mlflow".
      settings: the run's.
      say: told once if the service fails later.

    Raises:
      ModuleNotFoundError: its package is not installed.
      TrackerError: it does not take the run.
    """

    def __init__(self, service: str, settings: Settings, say: Callable[[str], None]) -> None:
        self._service, self._say = service, say
        module = importlib.import_module(service)
        path = settings.run / NAMES
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        try:
            self._began: _Began | None = _BEGIN[service](module, settings, known.get(service))
        except Exception as error:  # of the service's own kinds, which only it knows
            raise TrackerError(f"log.{service}: {_first(error)}") from error
        with complete(path) as working:
            working.write_text(json.dumps(known | {service: self._began.id}), encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes a step, but for what is not finite. It never raises: training does not end because of a service."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._try(lambda began: began.log(finite, step))

    def close(self) -> None:
        """Finishes the run at the service."""
        self._try(lambda began: began.finish())
        self._began = None

    def _try(self, action: Callable[[_Began], Any]) -> None:
        if self._began is None:
            return
        try:
            action(self._began)
        except Exception as error:
            self._began = None
            self._say(f"note: {self._service} is left out from here on: {_first(error)}")


def _wandb(wandb: Any, settings: Settings, id: str | None) -> _Began:
    """A run of Weights & Biases, with the step of training as its axis: its own never goes back."""
    run = wandb.init(
        project=settings.log.wandb,
        name=settings.run.name,
        id=id,
        resume="allow",
        dir=str(settings.run),
        config=settings.model_dump(mode="json"),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return _Began(run.id, lambda metrics, step: run.log({"step": step, **metrics}), run.finish)


def _mlflow(mlflow: Any, settings: Settings, id: str | None) -> _Began:
    """A run of MLflow, at the server of MLFLOW_TRACKING_URI."""
    mlflow.set_experiment(settings.log.mlflow)
    run = mlflow.start_run(run_id=id, run_name=settings.run.name)
    if id is None:
        mlflow.log_dict(settings.model_dump(mode="json"), "settings.json")
    return _Began(run.info.run_id, lambda metrics, step: mlflow.log_metrics(metrics, step=step), mlflow.end_run)


_BEGIN: dict[str, Callable[[Any, Settings, str | None], _Began]] = {"wandb": _wandb, "mlflow": _mlflow}


def wanted(settings: Settings) -> list[str]:
    """The services that settings ask for."""
    return [service for service in SERVICES if getattr(settings.log, service) is not None]


def _first(error: Exception) -> str:
    """The first line of what a service says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
