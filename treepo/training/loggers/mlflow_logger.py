"""MLflow: numbers by step, the configuration as parameters, tables and the summary as artifacts.

MLflow cannot take numbers back. A step that is repeated, after a run went back to a checkpoint, has both
values; its charts show both, and the later one is current.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from treepo.data.output_folder import write_file
from treepo.training.loggers.logger import NO_STEP, LoggedRun, State, Tell, flat

LINK = "mlflow.json"
_EVERY_STEP_HAS = "leaves"  # a metric
_STATES: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)  # of MLflow
_MOST_PARAMS = 100  # in one request
_LONGEST_PARAM = 6000  # characters


class MlflowLogger:
    """The `Logger`. mlflow.json in the run folder names the MLflow run, so that a resumed run goes on with
    it.
    """

    def __init__(self, run: LoggedRun, tell: Tell) -> None:
        self._logged, self._tell = run, tell
        self._client: Any = None
        self._id = ""

    def begin(self, step: int) -> int:
        if self._client is None:
            self._client = MlflowClient(self._logged.options["tracking_uri"])
        self._id = self._id or self._read_id() or self._create()
        self._client.update_run(self._id, status="RUNNING")
        history = self._client.get_metric_history(self._id, _EVERY_STEP_HAS)
        return min(max((metric.step for metric in history), default=NO_STEP), step)

    def config(self) -> None:
        there = self._client.get_run(self._id).data.params  # which cannot change
        values = flat(self._logged.config)
        params = [Param(name, _text(value)) for name, value in values.items() if name not in there]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MOST_PARAMS])
        self._client.log_dict(self._id, dict(self._logged.config), "config.yaml")

    def metrics(self, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        milliseconds = int(seconds * 1000)
        metrics = [
            Metric(_NOT_IN_NAMES.sub("_", name), value, milliseconds, step)
            for name, value in values.items()
            if value is not None
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        by_column = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
        self._client.log_table(self._id, by_column, f"trees/step-{step:05d}.json")

    def summary(self, values: Mapping[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in flat(values, "summary/", "/").items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self.metrics(values["steps"], time.time(), numbers)
        self._client.log_dict(self._id, dict(values), "summary.json")

    def end(self, state: State) -> None:
        if self._id:
            self._client.set_terminated(self._id, status=_STATES[state])

    def passes(self, error: Exception) -> bool:
        if isinstance(error, MlflowException):
            return error.get_http_status_code() in (408, 429) or error.get_http_status_code() >= 500
        return isinstance(error, OSError)

    def _create(self) -> str:
        """Create the run in its experiment, which is created too if there is none."""
        options, environment = self._logged.options, os.environ
        name = options["experiment"] or environment.get("MLFLOW_EXPERIMENT_NAME") or "treepo"
        experiment = self._client.get_experiment_by_name(name)
        run = self._client.create_run(
            self._client.create_experiment(name) if experiment is None else experiment.experiment_id,
            run_name=options["name"] or environment.get("MLFLOW_RUN_NAME") or self._logged.folder.name,
            tags={"mlflow.source.name": "treepo train"} | dict(options["tags"]),
        )
        link = {"run_id": run.info.run_id, "experiment": name, "tracking_uri": self._client.tracking_uri}
        write_file(self._logged.folder / LINK, json.dumps(link, indent=2) + "\n")
        self._tell(f"logged as run {run.info.run_id} of the experiment {name}", warn=False)
        return run.info.run_id

    def _read_id(self) -> str:
        path = self._logged.folder / LINK
        return json.loads(path.read_bytes())["run_id"] if path.is_file() else ""


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:_LONGEST_PARAM]
