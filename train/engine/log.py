"""What a run says while it goes on: a bar with tokens/s and the time left, and a log in a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longctx.errors import RunError

__all__ = ["Log"]

_EVERY = 30.0  # seconds between two lines where there is no terminal


class Log(TrainerCallback):
    """Writes log.jsonl and shows a bar, or now and then a line where there is no terminal."""

    def __init__(self, path: Path, *, shown: bool) -> None:
        self.path = path
        self.shown = shown
        self.console = Console(stderr=True, highlight=False)
        self.bar = RichProgress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
            disable=not (shown and self.console.is_terminal),
            speed_estimate_period=600,
        )
        self.task = self.bar.add_task("")
        self.began = self.said = 0.0
        self.before = (0, 0)
        """Tokens and updates of the run before it was resumed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin the log anew with what a resumed run has kept."""
        self.began = self.said = time.monotonic()
        self.before = state.num_input_tokens_seen, state.global_step
        if state.is_world_process_zero:
            self._write("".join(json.dumps(entry) + "\n" for entry in state.log_history), "w")
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Write the newest entry and say how it goes."""
        if not state.is_world_process_zero or not state.log_history:
            return
        entry = state.log_history[-1]
        entry["tokens"] = state.num_input_tokens_seen
        entry.pop("epoch", None)  # of the rows drawn for this run: not a pass over the data
        self._write(json.dumps(entry) + "\n", "a")
        found = [name for name in ("loss", "sequence_loss") if name in entry]
        if not found:
            return
        seconds = time.monotonic() - self.began
        rate = (state.num_input_tokens_seen - self.before[0]) / max(seconds, 1e-9)
        what = f"{found[0].replace('_', ' ')} {entry[found[0]]:.3f}, {rate:,.0f} tokens/s"
        self.bar.update(self.task, completed=state.global_step, description=what)
        due = time.monotonic() - self.said > _EVERY or state.global_step == state.max_steps
        if self.shown and not self.console.is_terminal and due:
            self.said = time.monotonic()
            done = max(state.global_step - self.before[1], 1)
            left = seconds / done * (state.max_steps - state.global_step)
            self.console.print(
                f"update {state.global_step:,} of {state.max_steps:,}, {what}, "
                f"{left / 60:.0f} min left"
            )

    def _write(self, text: str, mode: str) -> None:
        try:
            with self.path.open(mode) as file:
                file.write(text)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error}. Make room and pass resume (--resume)."
            ) from error

    def close(self) -> None:
        """Take the bar off the screen."""
        self.bar.stop()
