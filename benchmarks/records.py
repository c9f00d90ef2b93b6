"""Records: what was measured, where and with which code, as JSON; report.py reads them.

<folder>/<device>/<benchmark>.json      {"benchmark", "environment", "ceilings", "cases": [...]}
"""

import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import vkd_kernels as vk

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
        **{key: facts[key] for key in ("python", "torch", "cuda", "triton", "vkd_kernels", "extension")},
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
            was = self.content["environment"]
            differs = [key for key in was if key not in ("time", "load_average", "clocks") and was[key] != now.get(key)]
            if differs:
                raise SystemExit(f"{self.path} is another machine's or version's: {', '.join(differs)}")
        else:
            self.content = {"benchmark": benchmark, "environment": now, "ceilings": ceilings, "cases": []}
        self.ceilings = self.content["ceilings"]

    def add(self, case: dict) -> None:
        """A case, in place of an earlier one of its name."""
        by_name = {c["case"]: c for c in self.content["cases"]} | {case["case"]: case}
        self.content["cases"] = list(by_name.values())
        write(self.path, self.content)


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read_one(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def read(folder: Path) -> dict[str, dict[str, dict]]:
    """{device folder: {benchmark: record}} of every record below the folder."""
    records = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        content = json.loads(path.read_text())
        records.setdefault(path.parent.name, {})[content["benchmark"]] = content
    return records
