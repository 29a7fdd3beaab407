"""MLflow: one run per stage in the experiment `project`, tagged with its chain.

MLFLOW_TRACKING_URI names a server. Without it, the runs go to `mlflow.db` in the run's folder. By default, MLflow's
client retries for many minutes. We limit retries to seconds, because the runner waits for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chain.tracking.content import Table, numbers

_TAG_CHARACTERS = 5000
"""MLflow's own limit for the value of a tag."""


def open_mlflow(project: str, group: str, stage: str, config: Mapping[str, Any], run_dir: Path) -> MlflowRun:
    """A new MLflow run. Raises ModuleNotFoundError with the remedy if MLflow is not installed."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}; pip install "sailvl2-posttrain[mlflow]"') from None

    server = os.environ.get("MLFLOW_TRACKING_URI")
    client = mlflow.MlflowClient(tracking_uri=server or f"sqlite:///{(run_dir / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name(project)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        files = None if server else (run_dir / "mlflow").resolve().as_uri()
        experiment_id = client.create_experiment(project, artifact_location=files)
    tags = {"chain": group, "stage": stage}
    run_id = client.create_run(experiment_id, run_name=f"{group}/{stage}", tags=tags).info.run_id
    client.log_dict(run_id, dict(config), "config.json")
    return MlflowRun(client, run_id)


class MlflowRun:
    """One stage's run at MLflow."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self._run_id, self._step = client, run_id, 0

    def log(self, record: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        self._step, now = step, int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers(record).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def table(self, name: str, table: Table, step: int) -> None:
        folder = f"{name}/{step:06d}"
        shown: dict[str, list[Any]] = {column: [] for column in table.columns}
        for number, row in enumerate(table.rows):
            for place, (column, value) in enumerate(zip(table.columns, row, strict=True)):
                if place < table.pictures and value is not None:
                    file = f"{folder}/{number}-{place + 1}.png"
                    self._client.log_image(self._run_id, value, file)
                    value = file
                shown[column].append(value)
        self._client.log_dict(self._run_id, shown, f"{folder}.json")

    def summary(self, values: Mapping[str, float]) -> None:
        self.log(values, self._step)

    def alert(self, title: str, text: str) -> None:
        self._client.set_tag(self._run_id, f"alert {self._step} {title}"[:250], text[:_TAG_CHARACTERS])

    def finish(self, exit_code: int) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if exit_code else "FINISHED")
