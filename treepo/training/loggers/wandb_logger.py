"""Weights & Biases. A row of its history is a step of the run.

Offline, every start of a run writes a folder of its own, whole from the beginning. Online, a run that goes
back rewinds its W&B run; where the server cannot do that, repeated steps keep their first values.
"""

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import wandb
from wandb.errors import Error

from treepo.data.output_folder import write_file
from treepo.errors import one_line, shortened
from treepo.training.loggers.logger import NO_STEP, LoggedRun, State, Tell, flat

LINK = "wandb.json"
_EXIT_CODES: dict[State, int] = {"finished": 0, "failed": 1, "stopped": 130}


class WandbLogger:
    """The `Logger`. wandb.json in the run folder names the W&B run, so that a resumed run goes on with it."""

    def __init__(self, run: LoggedRun, tell: Tell) -> None:
        self._logged, self._tell = run, tell
        self._run: Any = None
        self._kept = NO_STEP  # steps up to here cannot be logged again
        self._id = self._read_id()

    def begin(self, step: int) -> int:
        if self._run is not None:
            self._run.finish()
        self._run = self._started()
        last = self._last_step()
        self._kept = NO_STEP
        if last > step:
            self._rewind(step, last)
        self._write_link()
        return min(last, step)

    def config(self) -> None:
        self._run.config.update(dict(self._logged.config), allow_val_change=True)

    def metrics(self, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        del seconds  # W&B takes the time of the call
        if step > self._kept:
            self._run.log(
                {name: math.nan if value is None else value for name, value in values.items()}, step=step
            )

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if step > self._kept:
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({"trees": table}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(flat(values, "summary/", "/"))

    def end(self, state: State) -> None:
        if self._run is not None:
            self._run.finish(exit_code=_EXIT_CODES[state])

    def passes(self, error: Exception) -> bool:
        return isinstance(error, OSError)

    def _started(self) -> Any:
        """The W&B run; offline if the server cannot be reached or refuses it."""
        mode = self._logged.options["mode"] or os.environ.get("WANDB_MODE") or "online"
        if mode != "online":
            return self._init(mode=mode, resume="allow")
        try:
            return self._init(mode="online", resume="allow")
        except Error as error:
            wandb.teardown()  # it would still hold the run's id
            run = self._init(mode="offline", resume="allow")
            uploads = f"`wandb sync {run.settings.sync_dir}` uploads it"
            self._tell(f"{_reason(error)}; the run is logged offline, and {uploads}")
            return run

    def _last_step(self) -> int:
        """The last step that the server has; NO_STEP if none, or if the run is offline."""
        return self._run.starting_step - 1

    def _rewind(self, step: int, last: int) -> None:
        self._run.finish()
        try:
            self._run = self._init(mode="online", resume_from=f"{self._id}?_step={step}")
        except Error as error:
            wandb.teardown()
            self._tell(
                f"{_reason(error)}; the W&B run cannot go back to step {step}: steps {step + 1} to {last} "
                "keep their first values there"
            )
            self._run = self._started()
            self._kept = self._last_step()

    def _init(self, **how: Any) -> Any:
        options, environment = self._logged.options, os.environ
        folder = {} if environment.get("WANDB_DIR") else {"dir": str(self._logged.folder)}
        return wandb.init(
            id=self._id,
            project=options["project"] or environment.get("WANDB_PROJECT") or "treepo",
            name=options["name"] or environment.get("WANDB_NAME") or self._logged.folder.name,
            entity=options["entity"],
            group=options["group"],
            tags=options["tags"] or None,
            settings=wandb.Settings(
                console="off",
                silent=True,
                x_stats_pid=self._logged.pid,
                program="treepo train",
            ),
            **folder,
            **how,
        )

    def _read_id(self) -> str:
        path = self._logged.folder / LINK
        if path.is_file():
            return json.loads(path.read_bytes())["id"]
        return os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)

    def _write_link(self) -> None:
        run = self._run
        link = {"id": self._id, "project": run.project, "entity": run.entity or None, "url": run.url}
        write_file(self._logged.folder / LINK, json.dumps(link, indent=2) + "\n")
        self._tell(f"logged as {run.url or run.settings.sync_dir}", warn=False)


def _reason(error: Exception) -> str:
    return shortened(one_line(error), 300).rstrip(". ")
