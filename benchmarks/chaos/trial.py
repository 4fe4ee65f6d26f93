"""One case: a run, its fault, its supervisor, and what holds afterwards. Runs inside a sandbox.

The supervisor does what an operator's would: it starts `treepo train --resume` again after every end but a
normal one, at most `_STARTS` times.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos import invariants, sandbox, scene
from benchmarks.chaos.disk import SmallDisk
from benchmarks.chaos.faults import Fault, check_ends
from benchmarks.chaos.strike import Progress, RunEndedError, send, wait_for_moment, wake

_STARTS = 4
_GRACE_SECONDS = 90.0  # for processes to end after the driver
_MARGIN_SECONDS = 60.0  # of a busy machine
_DRIVER_STOP_SECONDS = 10.0
_POLL = 0.05
_BAD_INPUT = 2
_HEAD_PORT = 6400


def noticed_after(fault: Fault) -> float:
    """Seconds by which a stopped or disturbed process must have been noticed, from the keys of the run."""
    engine = max(2 * scene.HEALTH_SECONDS, scene.UPDATE_SECONDS + 1)
    return {
        "engine": engine,
        "scheduler": engine,
        "worker": scene.SILENCE_SECONDS + engine,
        "trainer": scene.SILENCE_SECONDS,
        "grader": scene.GRADE_SECONDS,
        "disk": scene.DISK_SECONDS / 3,
        "driver": _DRIVER_STOP_SECONDS,
    }.get(fault.process, scene.SILENCE_SECONDS)


@dataclass(slots=True)
class Trial:
    """The parts of a case while it runs. Of each start, `ends` has the exit code, and `gone_after` the
    seconds from its driver's end until no process was left. faults: what did not hold.
    """

    fault: Fault
    folder: Path
    ends: list[int] = field(default_factory=list)
    gone_after: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    hit: str = ""
    hung: bool = False
    _history: invariants.History = field(default_factory=invariants.History)
    _node_command: list[str] = field(default_factory=list)
    _node: "subprocess.Popen[bytes] | None" = None

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def run(self, inputs: Path, reference: Path | None) -> dict[str, Any]:
        """Run the case; returns its line without seed and number."""
        began = time.monotonic()
        config = self._config(inputs)
        path = scene.write_config(self.folder, config)
        with SmallDisk(self.out, self.fault.process == "disk") as disk:
            self._supervise(path, disk)
            if self.ends[-1] < 0 and not self.hung:
                self._start_another(path)
            if not self.hung:
                self._check_history(inputs, reference)
            self.leftovers += invariants.unfinished_files(self.out)
        self.leftovers += [f"{entry}" for entry in sandbox.files(self.folder)]
        self.leftovers += [f"socket {address}" for address in sandbox.listening()]
        return self._line(round(time.monotonic() - began, 1))

    def _config(self, inputs: Path) -> dict[str, Any]:
        split = self.fault.process == "node"
        config = scene.config_of(inputs, self.out, self.fault.loop, self.fault.transport, split=split)
        if self.fault.phase == "grading":
            config["reward"]["function"] = "benchmarks.chaos.scene:slow_even_length"
        if self.fault.phase == "evaluation":
            config["data"]["heldout"] = str(inputs / "heldout.jsonl")
            config["evaluation"] = {"every": 1}
        return config

    def _supervise(self, config: Path, disk: SmallDisk) -> None:
        for number in range(_STARTS):
            log = self.folder / f"start-{number + 1}.txt"
            driver = self._start(config, number > 0, log)
            deadline = time.monotonic() + scene.START_SECONDS + _MARGIN_SECONDS
            if number == 0:
                deadline += self._strike(driver, disk, deadline)
            self._wait(driver, deadline)
            self._after(driver, log)
            if self.hung or driver.returncode in (0, _BAD_INPUT) or (self.out / "summary.json").exists():
                return
            disk.free()

    def _start_another(self, config: Path) -> None:
        """After a run that was killed when it was complete: another run removes what it left."""
        log = self.folder / "another.txt"
        overrides = (f"out={self.folder / 'another'}", "steps=1", "checkpoint.every=null")
        driver = scene.start(scene.train_command(config, False, *overrides), log)
        self._wait(driver, time.monotonic() + scene.START_SECONDS + _MARGIN_SECONDS)
        self._after(driver, log)

    def _start(self, config: Path, resume: bool, log: Path) -> "subprocess.Popen[bytes]":
        if self.fault.process != "node":
            return scene.start(scene.train_command(config, resume), log)
        self._node = None
        head = f"{sandbox.ADDRESS}:{_HEAD_PORT}"
        self._node_command = sandbox.on_other_host(scene.launch_command(config, resume, 1, head))
        return scene.start(scene.launch_command(config, resume, 0, head), log)

    def _keep_node(self) -> None:
        """Start the second node, and again whenever it has failed, as a cluster's scheduler would."""
        if self._node_command and (self._node is None or self._node.poll()):
            self._node = scene.start(self._node_command, self.folder / "node.txt")

    def _strike(self, driver: "subprocess.Popen[bytes]", disk: SmallDisk, deadline: float) -> float:
        """Wait for the moment and strike; returns the seconds that the fault may add to the run."""

        def alive() -> bool:
            self._keep_node()
            self._reap(driver)
            return driver.poll() is None and time.monotonic() < deadline

        try:
            targets = wait_for_moment(self.fault, self.out, alive)
        except RunEndedError:
            return 0.0
        self.hit = Progress.of(self.out).phase
        if self.fault.signal == "FULL":
            disk.fill()
            self.struck = ["disk"]
        else:
            self.struck = send(self.fault.signal, targets)
        seconds = noticed_after(self.fault)
        if self.fault.signal in ("STOP", "FULL"):
            self._let_pass(driver, targets, seconds)
            disk.free()
        return seconds + scene.START_SECONDS  # of an engine or a rank that is started again

    def _let_pass(
        self, driver: "subprocess.Popen[bytes]", targets: list[psutil.Process], seconds: float
    ) -> None:
        """Wait until the fault must have been noticed, then take it back."""
        end = time.monotonic() + seconds + 5
        while time.monotonic() < end and driver.poll() is None:
            self._keep_node()
            time.sleep(_POLL)
        wake(targets)

    def _wait(self, driver: "subprocess.Popen[bytes]", deadline: float) -> None:
        """Wait for the driver's end. At the deadline the case has hung, and everything is killed."""
        while driver.poll() is None:
            self._keep_node()
            self._reap(driver)
            if time.monotonic() > deadline:
                self.hung = True
                self.faults.append(f"the run has not ended in time; it shows {Progress.of(self.out).phase}")
                for process in sandbox.processes():
                    process.kill()
                driver.wait()
            time.sleep(_POLL)
        self.ends.append(driver.returncode)

    def _reap(self, driver: "subprocess.Popen[bytes]") -> None:
        sandbox.reap({driver.pid} | ({self._node.pid} if self._node is not None else set()))

    def _after(self, driver: "subprocess.Popen[bytes]", log: Path) -> None:
        """After a start has ended: its processes end soon too, and its errors are lines, not tracebacks."""
        began = time.monotonic()
        if self._node is not None and driver.returncode != 0:
            self._node.terminate()  # it would wait for the head to come back
        while left := sandbox.processes():
            self._reap(driver)
            if self._node is not None:
                self._node.poll()
            if time.monotonic() > began + _GRACE_SECONDS:
                self.leftovers += [f"process {sandbox.description(one)}" for one in left]
                for process in left:
                    process.kill()
                break
            time.sleep(_POLL)
        self.gone_after.append(round(time.monotonic() - began, 1))
        sandbox.reap()
        text = log.read_text(errors="replace")
        for sign in ("Traceback", "\x1b[", "Fatal Python error", "*** SIG"):
            if sign in text:
                self.faults.append(f"{log.name} has {sign!r} (exit code {driver.returncode})")

    def _check_history(self, inputs: Path, reference: Path | None) -> None:
        if not (self.out / "summary.json").exists():
            self.faults.append("the run did not come to its end")
            return
        names = [f"train:{row}" for row in range(scene.ROWS)]
        passed = invariants.passed_prompts(self.out, names)
        trees = invariants.read_trees(self.out)
        self._history = invariants.check_trees(trees, passed, scene.STEPS, scene.PROMPTS)
        self.faults += self._history.faults
        metrics = invariants.read_lines(self.out / "metrics.jsonl")
        self.faults += invariants.check_metrics(metrics, scene.STEPS)
        exact = reference if self.fault.loop == "sync" else None
        self.faults += invariants.check_weights(self.out, inputs / "model", exact)

    def _line(self, seconds: float) -> dict[str, Any]:
        self.faults += check_ends(self.fault, bool(self.struck), self.ends)
        lost, doubled = self._history.lost, self._history.doubled
        ok = not (lost or doubled or self.hung or self.leftovers or self.faults)
        return {
            **self.fault.as_json(),
            "struck": self.struck,
            "hit": self.hit,
            "ok": ok,
            "lost": lost,
            "doubled": doubled,
            "hung": self.hung,
            "leftovers": self.leftovers,
            "ends": self.ends,
            "gone_after": self.gone_after,
            "faults": self.faults,
            "seconds": seconds,
        }


def main() -> None:
    """Arguments: a fault as JSON, the case's folder, the folder of inputs, the undisturbed run."""
    fault, folder, inputs, reference = sys.argv[1:]
    work = Path(inputs).parent
    sandbox.enter(work)
    trial = Trial(Fault(**json.loads(fault)), Path(folder))
    if trial.fault.process == "node":
        sandbox.add_other_host()
    line = trial.run(Path(inputs), Path(reference) if Path(reference).exists() else None)
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
