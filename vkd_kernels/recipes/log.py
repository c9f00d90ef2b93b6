"""What a training writes while it runs: metrics.jsonl, line by line; metrics.csv, the same in columns; TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from . import runs


class Log:
    """metrics.jsonl, one line at a time; metrics.csv, the same in columns; TensorBoard. Begins after `step`."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.folder, self.lines, self.table = folder, folder / "metrics.jsonl", folder / "metrics.csv"
        self.records = [record for record in runs.load_json_lines(self.lines) if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        runs.write_text(self.lines, text)  # without what came after the checkpoint
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, float]) -> None:
        self.records.append(record)
        runs.append(self.lines, json.dumps(record) + "\n")
        with runs.writing(self.folder / "tensorboard"):
            for name, value in record.items():
                if self.board and name not in ("step", "images"):
                    self.board.add_scalar(name, value, int(record["step"]))

    def flush(self) -> None:
        runs.save_csv(self.table, self.records)
        with runs.writing(self.folder / "tensorboard"):
            if self.board:
                self.board.flush()

    def close(self) -> None:
        self.flush()
        if self.board:
            self.board.close()
