"""Runs the steps of a call: limits, output, and everything packed after every step."""

import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.gpu import plan
from benchmarks.gpu.plan import Step

TAIL_LINES = 40


def run_call(call: int, folder: Path, rehearse: bool) -> bool:
    """Whether every step passed (or could not run here). Everything is written into folder/<commit>."""
    facts = records.environment()
    commit = facts.get("commit")
    folder = folder / (commit[:12] if commit else "unknown-commit")
    work, name = folder / "records", f"call{call}"
    refuse_other_records(work, facts)
    work.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.write_text("")
    report = {"benchmark": name, "rehearsal": rehearse, "environment": facts, "steps": []}
    began = time.monotonic()
    for group in plan.groups(call, work, rehearse):
        left_s = plan.LIMIT_S[call] - (time.monotonic() - began)
        outcomes = run_group(group, left_s, rehearse)
        for outcome in outcomes:
            with log.open("a") as file:
                file.write(f"==== {outcome['name']}: {outcome['outcome']} after {outcome['seconds']} s\n")
                file.write(outcome.pop("output") + "\n")
            report["steps"].append(outcome)
            print(
                f"{outcome['outcome']:10} {outcome['seconds']:6.1f} s   {outcome['name']}: {outcome['summary']}",
                flush=True,
            )
        for place in (folder, work / records.device_folder()):
            records.write(place / f"{name}.json", report)
        pack(work, folder / f"{name}-records.tgz")
    return all(outcome["outcome"] in ("passed", "skipped") for outcome in report["steps"])


def refuse_other_records(work: Path, facts: dict) -> None:
    """Before a step's time is lost: its records extend those that are there. The extension may not be built yet."""
    for path in (work / records.device_folder()).glob("*.json"):
        was = json.loads(path.read_text())["environment"]
        records.refuse_difference(path, was | {"extension": None}, facts | {"extension": None})


def run_group(group: list[Step], left_s: float, rehearse: bool) -> list[dict]:
    """The outcomes of steps that run side by side."""
    outcomes: list[dict] = [{} for _ in group]

    def work(index: int) -> None:
        outcomes[index] = run_step(group[index], left_s, rehearse)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(group))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def run_step(step: Step, left_s: float, rehearse: bool) -> dict:
    """How one step went: outcome, seconds, its last line, the end of its output and all of it."""
    outcome = {"name": step.name, "limit_s": step.limit_s, "command": public(" ".join(step.command))}
    if step.missing:
        return outcome | {"outcome": "skipped", "seconds": 0.0, "summary": step.missing, "tail": [], "output": ""}
    limit_s = 4 * step.limit_s if rehearse else min(step.limit_s, left_s)
    if limit_s < step.limit_s / 2:  # it would be cut short, and its time be lost
        summary = f"only {max(0.0, left_s):.0f} s were left"
        return outcome | {"outcome": "late", "seconds": 0.0, "summary": summary, "tail": [], "output": ""}
    began = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=records.ROOT,
        env=environment(step, rehearse),
        text=True,
        errors="replace",
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        ended = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own session: this ends the step's children too, and nothing else
        output, _ = process.communicate()
        ended = "timed out"
    output = public(output)
    lines = [line for line in output.splitlines() if line.strip()]
    return outcome | {
        "outcome": ended,
        "returncode": process.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "summary": lines[-1][:300] if lines else "",
        "tail": lines[-TAIL_LINES:],
        "output": output,
    }


def environment(step: Step, rehearse: bool) -> dict[str, str]:
    result = dict(os.environ) | step.environment
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(records.ROOT), result.get("PYTHONPATH")]))
    result["PYTHONUNBUFFERED"] = "1"
    if rehearse:
        return result | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result.pop("TRITON_INTERPRET", None)
    result.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():  # for this GPU alone: quicker
        major, minor = torch.cuda.get_device_capability()
        result.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    return result


def pack(folder: Path, archive: Path) -> None:
    """The folder as one file, whose folder has the archive's name: those of several calls can be unpacked together."""
    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz") as tar:
        tar.add(folder, arcname=archive.stem)
    part.replace(archive)


def public(text: str) -> str:
    """Without this machine's folders: the outcomes are committed."""
    for path, name in ((str(records.ROOT), "."), (sys.executable, "python"), (sys.prefix, "<python>")):
        text = text.replace(path, name)
    return text
