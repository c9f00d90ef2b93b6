"""The `vkd` command: `vkd distill TASK` trains one of the paper's tasks, `vkd info` says what is installed."""

from __future__ import annotations

import argparse
import sys

import vkd_kernels


def main(argv: list[str] | None = None) -> int:
    from vkd_kernels.recipes import classification

    parser = argparse.ArgumentParser("vkd", description="Feature distillation with an orthogonal projection (V_kD).")
    parser.add_argument("--version", action="version", version=f"vkd_kernels {vkd_kernels.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    distill = commands.add_parser("distill", help="train students of a teacher and compare ways to distil")
    tasks = distill.add_subparsers(title="tasks", required=True, metavar="TASK")
    for name, recipe in {"classification": classification}.items():
        task = tasks.add_parser(
            name, help=(recipe.__doc__ or name).splitlines()[0], description=recipe.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        recipe.add_arguments(task)
        task.set_defaults(command=recipe.command)

    info = commands.add_parser("info", help="versions, devices, which backend serves which op, and why not the others")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(command=show_info)

    arguments = parser.parse_args(argv)
    return arguments.command(arguments)


def show_info(arguments: argparse.Namespace) -> int:
    from vkd_kernels.info import main as info

    info(["--json"] if arguments.json else [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
