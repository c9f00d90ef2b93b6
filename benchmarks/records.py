"""Records: what was measured, where and with which code, as JSON; report.py reads them.

<folder>/<device>/<benchmark>.json      {"benchmark", "environment", "ceilings", "cases": [...]}

Records of one commit and machine that were written into several folders are merged, case by case, by

    python -m benchmarks.records FOLDER ... --into FOLDER
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import vkd_kernels as vk
from benchmarks import floors

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # committed
RUNS = ROOT / "runs" / "benchmarks"  # ignored by git
MEASURED = ("vkd_kernels", "csrc", "benchmarks/*.py", "benchmarks/gpu", "CMakeLists.txt", "setup.py")


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_folder() -> str:
    """'cpu', or the GPU's name as a folder: 'NVIDIA H200' -> 'h200'."""
    if device_type() == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace("nvidia", "").replace("geforce", "")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.rstrip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout, or what VKD_COMMIT says where the tree came without its .git."""
    return _output("git", "rev-parse", "HEAD") or os.environ.get("VKD_COMMIT")


def environment() -> dict:
    """Device, versions and the commit; `changed` lists the measured files that differ from it (None: no checkout)."""
    facts = vk.info()
    changed = _output("git", "status", "--porcelain", "--", *MEASURED)
    result = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name() if device_type() == "cuda" else _cpu_model(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        **{key: facts[key] for key in ("python", "torch", "cuda", "triton", "vkd_kernels", "extension", "requested")},
        "commit": commit(),
        "dirty": None if changed is None else bool(changed),
        "changed": None if changed is None else [line[3:] for line in changed.splitlines()],
    }
    if device_type() == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "clocks": clocks(),
        }
    return result


def refuse_changed_tree(folder: Path, facts: dict) -> None:
    """A published record names the commit that repeats it: none is written from a tree that differs from its commit."""
    if facts["dirty"] and Path(folder).resolve().is_relative_to(RESULTS):
        raise SystemExit(
            f"no record is published from a changed tree: {', '.join(facts['changed'])}. Commit first, or write to "
            f"another folder, such as --records {RUNS.relative_to(ROOT)}"
        )


def clocks() -> str | None:
    """The GPU's clocks now and at most, as nvidia-smi says them; read, never set."""
    names = "clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    return _output("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader")


def refuse_difference(path: Path, was: dict, now: dict) -> None:
    """The record at `path` is only extended on the same machine, with the same versions and commit."""
    differs = [key for key in was if key not in ("time", "load_average", "clocks") and was[key] != now.get(key)]
    if differs:
        raise SystemExit(
            f"{path} is another machine's or version's: {', '.join(differs)}. Nothing was overwritten: give another "
            "folder, or move that record away"
        )


class Record:
    """One benchmark's record, written anew after every case: a run that is cut short keeps what it has.

    extend: keep the cases, and the ceilings, of the record that is there, if it is of the same commit and machine; for
    a run in pieces.
    """

    def __init__(self, benchmark: str, folder: Path, ceilings: dict, extend: bool = False):
        self.path = Path(folder) / device_folder() / f"{benchmark}.json"
        now = environment()
        refuse_changed_tree(folder, now)
        if extend and self.path.exists():
            self.content = json.loads(self.path.read_text())
            refuse_difference(self.path, self.content["environment"], now)
        else:
            self.content = {"benchmark": benchmark, "environment": now, "ceilings": ceilings, "cases": []}
        self.ceilings = self.content["ceilings"]

    def add(self, case: dict) -> None:
        """A case, in place of an earlier one of its name."""
        self.content["cases"] = with_cases(self.content["cases"], [case])
        write(self.path, self.content)


def with_cases(cases: list[dict], later: list[dict]) -> list[dict]:
    return list(({case["case"]: case for case in cases} | {case["case"]: case for case in later}).values())


def in_json(value: Any) -> Any:
    """What JSON has no number for, as text: "nan", "inf"."""
    if isinstance(value, dict):
        return {name: in_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [in_json(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(in_json(content), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read_one(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def read(folder: Path) -> dict[str, dict[str, dict]]:
    """{device folder: {benchmark: record}} of every record below the folder."""
    records = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        content = json.loads(path.read_text())
        records.setdefault(path.parent.name, {})[content.get("benchmark", path.stem)] = content
    return records


def with_ceilings(case: dict, ceilings: dict) -> dict:
    """The case with its floor, and the shares of it, by other ceilings."""
    floor = floors.Cost(case["flops"], case["bytes"]).floor_seconds(ceilings, case["dtype"])
    rows = [dict(row) for row in case["rows"]]
    for row in rows:
        if "share_of_floor" in row:
            row["share_of_floor"] = floor / row["median_s"]
    return case | {"floor_s": floor, "rows": rows}


def merged(content: dict, later: dict) -> dict:
    """Both records of one benchmark: cases, and the steps of smoke.json, by their names; of others the later one.

    The ceilings are those of the first, as where a run extends a record.
    """
    if "cases" in content:
        cases = later["cases"]
        if "ceilings" in content:
            cases = [with_ceilings(case, content["ceilings"]) for case in cases]
        return content | {"cases": with_cases(content["cases"], cases)}
    if isinstance(content.get("steps"), dict):
        return content | {"steps": content["steps"] | later["steps"]}
    return later


def merge(sources: list[Path], target: Path) -> list[Path]:
    """Every record below the sources, merged into those below the target; refused before anything is written."""
    results: dict[Path, dict] = {}
    for source in sources:
        for device, of_device in read(source).items():
            for name, content in of_device.items():
                refuse_changed_tree(target, content["environment"])
                path = Path(target) / device / f"{name}.json"
                before = results.get(path) or read_one(path)
                if before:
                    refuse_difference(path, before["environment"], content["environment"])
                results[path] = merged(before, content) if before else content
    for path, content in results.items():
        write(path, content)
    return list(results)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.records", description="Merges records, case by case.")
    parser.add_argument("sources", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="whose records are extended")
    options = parser.parse_args(arguments)
    written = merge(options.sources, options.into)
    if not written:
        parser.error("no records in the folders: expected <device>/<benchmark>.json")
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
