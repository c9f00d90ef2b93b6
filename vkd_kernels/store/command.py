"""`vkd cache FOLDER`: a teacher's features of a folder of images, stored for `FeatureDistiller`."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints import read_weights
from ..pairs import POOLINGS
from ..taps import TapError
from .build import build, planned
from .options import Options
from .progress import in_words
from .samples import Samples
from .teacher import TappedTeacher, teacher_taps

DTYPES = ("float16", "bfloat16", "float32")
LIBRARIES = ("timm", "transformers")
TAP_OPTIONS = ("pool", "skip", "output", "call", "layout")  # as Pair has them with teacher_ before
PRETRAINED, RANDOM = "pretrained", "random"
EXAMPLES = """examples:
  vkd cache features --teacher timm:vit_small_patch14_dinov2.lvd142m --weights pretrained \\
      --images imagenet/train --tap norm,pool=tokens,skip=1
  torchrun --nproc-per-node 8 -m vkd_kernels.cli cache features ...       every GPU writes its share

Interrupted or killed, the same command continues. Without --tap it lists the modules and the shapes of their outputs.
The index of an image is its place in torchvision.datasets.ImageFolder(FOLDER), and so are its features' in
vkd_kernels.FeatureStore(folder).
"""


class UsageError(Exception):
    """Something the user can put right; the message says how."""

    def __init__(self, message: str) -> None:
        # PyTorch raises it again with the traceback of a DataLoader's worker, which ends in "Name: message".
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the store: new, or begun by the same command")
    about = "timm:NAME, or transformers:NAME, a folder or hub name; of CLIP, SigLIP and their like the vision model"
    parser.add_argument("--teacher", required=True, metavar="LIBRARY:NAME", help=about)
    parser.add_argument(
        "--weights",
        required=True,
        metavar="WEIGHTS",
        help="pretrained (as the library finds them), random, or a file of safetensors or torch.save: weights by name, "
        "or a training checkpoint with state_dict_ema, model_ema, state_dict or model, of which the first is read",
    )
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="a folder per class (ImageFolder)")
    parser.add_argument(
        "--tap",
        action="append",
        default=[],
        metavar="MODULE[,pool=POOL][,skip=N][,output=KEY][,call=N][,layout=NHWC]",
        help="a module's output, as Pair names it; '' is the model's own; may be given several times",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored (default: %(default)s)")
    parser.add_argument(
        "--teacher-dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, metavar="N", help="of the images, N x N (timm; default: the model's)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: %(default)s)")
    workers = min(8, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=workers, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", help="(default: cuda, if there is a GPU; cuda is of torchrun's ranks each its own)")
    about = "images per file (default: what fits in 256 MiB, at most a rank's share)"
    parser.add_argument("--shard-samples", type=int, metavar="N", help=about)
    parser.add_argument("--dry-run", action="store_true", help="sizes and shapes; writes nothing")


def command(arguments: argparse.Namespace) -> int:
    """What a user can mend is one line. Another RuntimeError is a fault of a model, of PyTorch or of this library."""
    try:
        return cache(arguments)
    except (UsageError, ValueError, TypeError, OSError) as error:
        print(f"vkd: error: {error}", file=sys.stderr)
        return 2
    except TapError as error:
        print(f"vkd: error: --tap: {error}; without --tap this command lists the modules that run", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"vkd: error: {error} A smaller --batch-size needs less", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"vkd: error: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vkd: stopped; the same command continues", file=sys.stderr)
        return 130


def cache(arguments: argparse.Namespace) -> int:
    from torchvision.datasets import ImageFolder

    if not arguments.images.is_dir():
        raise UsageError(f"--images: there is no folder {arguments.images}")
    device = checked_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    teacher, transform = open_teacher(arguments)
    teacher = teacher.to(device, getattr(torch, arguments.teacher_dtype)).eval()
    data = ImageFolder(str(arguments.images), transform, loader=read_image)
    if not arguments.tap:
        print("--tap is needed; this teacher's modules, and the shapes of what they return:\n" + outputs(teacher, data))
        return 2
    taps = teacher_taps([parsed_tap(text) for text in arguments.tap])
    options = Options(
        dtype=getattr(torch, arguments.dtype),
        batch_size=arguments.batch_size,
        num_workers=arguments.workers,
        shard_samples=arguments.shard_samples,
    )
    if not arguments.dry_run:
        build(arguments.folder, teacher, data, taps, options)
        return 0
    with TappedTeacher(teacher, taps, options) as frozen:
        manifest, _ = planned(frozen, Samples.of(data, options), options)
    for tap in manifest.taps.values():
        print(f"{tap}: {tap.shape} per image")
    size = in_words(manifest.samples * manifest.sample_bytes)
    print(f"{manifest.samples} images, {size} in {manifest.dtype}, {manifest.shards} shards")
    return 0


def checked_device(name: str) -> str:
    """The device, which must be able to compute; cuda is that of this rank of torchrun."""
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ModuleNotFoundError) as error:  # each kind of device has its own
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"--device {name}: {reason}; --device cpu needs no accelerator") from error
    return name


def open_teacher(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """(the model, the transform of its images)"""
    library, _, name = arguments.teacher.partition(":")
    if library not in LIBRARIES or not name:
        raise UsageError(f"--teacher: timm:NAME or transformers:NAME; got {arguments.teacher!r}")
    weights = arguments.weights
    if weights not in (PRETRAINED, RANDOM) and not Path(weights).is_file():
        raise UsageError(f"--weights: pretrained, random, or a file; there is no file {weights}")
    torch.manual_seed(0)  # random weights are the same when the command continues
    open_it = open_timm if library == "timm" else open_transformers
    model, transform = open_it(name, weights, arguments.size)
    if weights not in (PRETRAINED, RANDOM):
        load_weights(model, Path(weights))
    return (model if library == "timm" else vision_model(model)), transform


def open_timm(name: str, weights: str, size: int | None) -> tuple[nn.Module, Any]:
    import timm

    options: dict[str, Any] = {"pretrained": weights == PRETRAINED}
    try:
        model = timm.create_model(name, **(options if size is None else {**options, "img_size": size}))
    except TypeError:
        if size is None:
            raise
        model = timm.create_model(name, **options)  # a convolutional one, which takes images of any size
    except RuntimeError as error:
        raise UsageError(f"--teacher: {error}") from error
    config = timm.data.resolve_model_data_config(model)
    if size is not None:
        config["input_size"] = (config["input_size"][0], size, size)
    return model, timm.data.create_transform(**config, is_training=False)


def open_transformers(name: str, weights: str, size: int | None) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    if size is not None:
        raise UsageError("--size: with transformers the size is what the model's image processor says")
    if weights == PRETRAINED:
        model = AutoModel.from_pretrained(name)
    else:
        model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    return model, Processed(AutoImageProcessor.from_pretrained(name))


def vision_model(model: Any) -> nn.Module:
    """What takes images alone: the model of transformers itself, or the vision model within one of text and images."""
    name = type(model).__name__
    if model.main_input_name != "pixel_values":
        takes, model = model.main_input_name, getattr(model, "vision_model", None)
        if model is None:
            raise UsageError(f"--teacher: {name} takes {takes}, and has no vision_model that takes images")
    _, *others = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise UsageError(
            f"--teacher: {type(model).__name__} needs {', '.join(needed)} beside the images: build the store by "
            "FeatureStore.build, whose teacher_input= gives them"
        )
    return model


class Processed:
    """A transformers image processor as a transform."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Any) -> torch.Tensor:  # -> (3, H, W)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def __repr__(self) -> str:
        return json.dumps(self.processor.to_dict(), sort_keys=True, default=str)


def load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = read_weights(path)
    except ValueError as error:
        raise UsageError(f"--weights: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"--weights: {path} is of another model: {' '.join(str(error).split())[:400]}") from error


def read_image(path: str) -> Any:
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except Exception as error:  # PIL has as many types as kinds of damage, and most of them do not say which file
        raise UsageError(
            f"--images: cannot read {path} ({error}): mend this file. Without it the images after it have other "
            "indices, so that a store that was begun is to be built anew"
        ) from error


def parsed_tap(text: str) -> dict[str, Any]:
    module, *options = text.split(",")
    tap: dict[str, Any] = {"teacher": module}
    for option in options:
        key, _, value = option.partition("=")
        if key not in TAP_OPTIONS or not value:
            allowed = ", ".join(f"{name}=" for name in TAP_OPTIONS)
            raise UsageError(f"--tap {text}: after the module come {allowed}; got {option!r}")
        if key == "pool" and value not in POOLINGS:
            raise UsageError(f"--tap {text}: pool is one of {', '.join(filter(None, POOLINGS))}; got {value!r}")
        tap[f"teacher_{key}"] = int(value) if value.removeprefix("-").isdecimal() else value
    return tap


def outputs(teacher: nn.Module, data: Any) -> str:
    """Every module that returns a tensor, and the shape for one image."""
    lines: list[str] = []

    def note(name: str, output: Any) -> None:
        entries = output.items() if isinstance(output, dict) else [(None, output)]
        for key, value in entries:
            if isinstance(value, torch.Tensor):
                lines.append(f"  {name + ('' if key is None else f',output={key}'):50} {(1, *value.shape[1:])}")

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: note(name, output))
        for name, module in teacher.named_modules()
    ]
    image, parameter = data[0][0], next(teacher.parameters())
    with torch.no_grad():
        teacher(image[None].to(parameter.device, parameter.dtype))
    for handle in handles:
        handle.remove()
    return "\n".join(lines)
