"""``python -m vkd_kernels.info [--json]``: what this installation is and can do (_info.py collects it)."""

import argparse
import json

from ._info import info


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vkd_kernels.info", description=__doc__.partition(":")[2].strip())
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    facts = info()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
        return
    ops = facts.pop("ops")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        print(f"{name:12} {value}")
    for op, devices in ops.items():
        for device, row in devices.items():
            print(f"{op} on {device}: {row['served_by']}")
            for backend, reason in row["not"].items():
                print(f"    not {backend}: {reason}")


if __name__ == "__main__":
    main()
