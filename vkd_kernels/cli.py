"""The `vkd` command: trains the paper's tasks, stores a teacher's features, and says what is installed."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from typing import Any

import vkd_kernels

# Command -> (its module, what it does). Imported when it is called: most of them need the extra [recipes].
COMMANDS = {
    "distill": ("vkd_kernels.recipes.compare", "train students of a teacher and compare ways to distill"),
    "cache": ("vkd_kernels.store.command", "store a teacher's features of a folder of images"),
}
FLAGS = ("--help", "--resume", "--quiet")  # the options of `vkd distill` without a value
EXTRAS = {"pycocotools": "detection", "transformers": "detection", "torch_fidelity": "generation"}  # others: recipes


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # "±" on a terminal that has none must not end a run
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("vkd", description="Feature distillation with an orthogonal projection (V_kD).")
    parser.add_argument("--version", action="version", version=f"vkd_kernels {vkd_kernels.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, add_help=name != "distill")  # it shows a task's configuration
        if words[:1] == [name]:
            if name == "distill" and words[1:] and not {*words[1:]} - {"-h", "--help"}:
                words = [*words, "classification"]
            try:
                recipe: Any = importlib.import_module(module)
            except ModuleNotFoundError as error:
                return missing(error)
            recipe.add_arguments(command)
            command.set_defaults(command=recipe.command, parser=command)
    info = commands.add_parser(
        "info", help="versions, devices, which implementation serves each operation, and why not the others"
    )
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(command=show_info)

    at = [n for n in range(len(words)) if words[0] == "distill" and is_value(words[n], after=words[n - 1])]
    arguments = parser.parse_args([word for n, word in enumerate(words) if n not in at])
    arguments.values = [words[n] for n in at]
    try:
        return arguments.command(arguments)
    except ModuleNotFoundError as error:
        return missing(error)
    except BrokenPipeError:  # `vkd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:  # between two trainings; files are never half written
        print("vkd: stopped; --resume continues", file=sys.stderr)
        return 130


def is_value(word: str, after: str) -> bool:
    """Whether a word of `vkd distill` is a.b=c, which may stand anywhere but as the value of an option."""
    of_option = after.startswith("--") and "=" not in after and not any(flag.startswith(after) for flag in FLAGS)
    return bool(re.match(r"[A-Za-z_][\w.]*=", word)) and not of_option


def missing(error: ModuleNotFoundError) -> int:
    name = error.name or ""
    if name.startswith("vkd_kernels"):
        raise error
    remedy = f"{name} is missing: pip install 'vkd_kernels[{EXTRAS.get(name.split('.')[0], 'recipes')}]'"
    print(f"vkd: error: {remedy if name else error}", file=sys.stderr)
    return 2


def show_info(arguments: argparse.Namespace) -> int:
    from vkd_kernels._info import main

    main(["--json"] if arguments.json else [])
    return 0


if __name__ == "__main__":
    sys.exit(main())
