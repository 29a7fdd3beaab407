"""TensorBoard: event files in `tensorboard/<stage>` of the run's folder; `tensorboard --logdir` shows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chain.tracking.content import Table, numbers


def open_tensorboard(stage: str, config: Mapping[str, Any], run_dir: Path) -> TensorBoardRun:
    """Event files of one stage. They replace the event files of an earlier start of the stage.

    Raises ModuleNotFoundError with the remedy if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}; pip install "sailvl2-posttrain[tensorboard]"') from None

    folder = run_dir / "tensorboard" / stage
    shutil.rmtree(folder, ignore_errors=True)
    writer = SummaryWriter(str(folder), flush_secs=10)
    writer.add_text("config", f"```json\n{json.dumps(dict(config), indent=2, default=str)}\n```")
    return TensorBoardRun(writer)


class TensorBoardRun:
    """One stage's event files."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._step = writer, 0

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._step = step
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, table: Table, step: int) -> None:
        columns = table.columns[table.pictures :]
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for number, row in enumerate(table.rows):
            lines.append("| " + " | ".join(_cell(value) for value in row[table.pictures :]) + " |")
            for place, picture in enumerate(row[: table.pictures]):
                if picture is not None:
                    self._add_picture(f"{name}/{number} {table.columns[place]}", picture, step)
        self._writer.add_text(name, "\n".join(lines), step)

    def _add_picture(self, name: str, picture: Any, step: int) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._step)

    def alert(self, title: str, text: str) -> None:
        self._writer.add_text("alerts", f"{title}: {text}", self._step)

    def finish(self, exit_code: int) -> None:
        if exit_code:
            self._writer.add_text("failed", f"exit code {exit_code}", self._step)
        self._writer.close()


def _cell(value: Any) -> str:
    """Text for a Markdown table cell: one line, without markup."""
    text = "" if value is None else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
