"""Building a store: shares of the ranks, shards that are written whole, and what tells that a store is stale."""

import dataclasses
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import abandoned_files, partial_file
from ..ops.float64 import as_float64
from ..pairs import Pair
from ..taps import tensors_in
from .functions import weights_fingerprint
from .manifest import (
    MANIFEST,
    OWN_FILE,
    PROBE,
    Manifest,
    missing_shards,
    shard_path,
    signs_of_work,
    writing,
)
from .options import Options
from .progress import Progress, duration, in_words
from .samples import Samples
from .teacher import Answer, TappedTeacher

SHARD_BYTES, MOST_SHARD_SAMPLES = 256 * 2**20, 8192
PROBE_TOLERANCE = 0.05  # relative: another device or precision stays below it, another transform or pool does not
NOTABLE_SILENCE = 30.0  # seconds without a sign of work, after which a rank says what it waits for
VISITS = 8  # of the probed samples, to see whether they are the same every time
LONGEST_SILENCE = 1800.0  # seconds without a sign of work, after which a rank stops waiting for the others


def build(folder: Path, teacher: nn.Module, data: Any, pairs: list[Pair], options: Options) -> None:
    rank, ranks = options.share()
    samples = Samples.of(data, options)
    check_folder(folder)
    with TappedTeacher(teacher, pairs, options) as frozen:
        manifest = open_manifest(folder, frozen, samples, options)
        missing = missing_shards(folder, manifest)
        if missing:
            check_all_taps(folder, manifest, frozen)
        check_room(folder, manifest, missing)
        progress = Progress(folder, manifest, missing, ranks, enabled=options.progress and rank == 0)
        mine = [shard for shard in missing if shard % ranks == rank]
        batches = samples.batches(manifest, mine)
        for shard in mine:
            path = shard_path(folder, shard)
            sign_of_work = partial_file(path)
            try:
                features = compute_shard(frozen, manifest, shard, batches, progress, sign_of_work)
                save_tensors(path, features, store=manifest.identity())
            finally:
                sign_of_work.unlink(missing_ok=True)
    wait_for_others(folder, manifest, ranks)
    if missing and rank == 0:
        progress.end()
        for path in abandoned_files(folder):  # others may be building the same store
            path.unlink(missing_ok=True)


def compute_shard(
    frozen: TappedTeacher,
    manifest: Manifest,
    shard: int,
    batches: Iterator[tuple[list[int], Any]],
    progress: Progress,
    sign_of_work: Path,
) -> dict[str, torch.Tensor]:
    """The shard's features by key; the file is touched with every batch, so that waiting ranks see that it comes."""
    rows = manifest.rows_of(shard)
    features = {
        key: torch.empty((len(rows), *tap.shape), dtype=manifest.torch_dtype) for key, tap in manifest.taps.items()
    }
    done = 0
    while done < len(rows):
        sign_of_work.touch()
        indices, batch = next(batches)
        answer = frozen(batch, len(indices))
        for key, left in answer.left.items():
            if not left.all():
                raise ValueError(
                    f"mask leaves no position of sample {indices[int(left.logical_not().nonzero()[0])]}, so that its "
                    f"mean in {key!r} would be of nothing: leave such samples out of data"
                )
        for key, tensor in features.items():
            found = answer.features[key]
            if found.shape[1:] != tensor.shape[1:]:
                raise ValueError(
                    f"features of {key!r} must have one shape for all samples, {tuple(tensor.shape[1:])}; the samples "
                    f"{indices[0]} to {indices[-1]} have {tuple(found.shape[1:])}: pad or resize the input alike"
                )
            tensor[done : done + len(indices)] = as_stored(found, manifest.torch_dtype, key, indices)
        done += len(indices)
        progress.add(len(indices))
    return features


def as_stored(features: torch.Tensor, dtype: torch.dtype, key: str, indices: Sequence[int]) -> torch.Tensor:
    """The features in the store's precision, on the CPU; an error where they are not finite there, or vanish."""
    converted = as_float64(features) if dtype == torch.float64 else features.to(dtype)
    rows = converted.flatten(1)
    vanish = rows.eq(0).all(1) & features.flatten(1).ne(0).any(1)
    lost = vanish | rows.isfinite().all(1).logical_not()
    if lost.any():
        first = int(lost.nonzero()[0])
        what = "all 0" if vanish[first] else "not finite"
        if not features[first].isfinite().all():
            remedy = "the teacher itself gives NaN or Inf"
        else:
            largest = features[first].abs().max().item()
            in_bfloat16 = torch.tensor(largest, dtype=torch.bfloat16)
            wide = torch.bfloat16 if in_bfloat16.isfinite() and in_bfloat16 > 0 else torch.float64
            remedy = f"their largest is {largest:.3g}; dtype={wide} holds it, in another folder or when this is deleted"
        raise ValueError(f"features of {key!r} are {what} in {dtype} at sample {indices[first]}: {remedy}")
    return converted.cpu()


def open_manifest(folder: Path, frozen: TappedTeacher, samples: Samples, options: Options) -> Manifest:
    """The manifest of the store in the folder, which must be of this teacher and these data; or a new one."""
    wanted, probe = planned(frozen, samples, options)
    if not (folder / MANIFEST).exists():
        check_room(folder, wanted, missing_shards(folder, wanted))
        check_views(frozen, samples, probe)
        save_tensors(folder / PROBE, probe_tensors(probe), replace=False)
        check_fresh(folder, wanted, wanted, probe)  # another job may have been first, with other data
        data = hashlib.sha256((folder / PROBE).read_bytes()).hexdigest()[:16]  # every rank reads the same file
        dataclasses.replace(wanted, data=data).save(folder)
    manifest = Manifest.load(folder)
    check_fresh(folder, manifest, wanted, probe)
    return manifest


def planned(frozen: TappedTeacher, samples: Samples, options: Options) -> tuple[Manifest, Answer]:
    """The manifest of a new store, and the teacher's answer to a few samples, which shows the features' shapes."""
    probe = frozen(samples.batch(samples.probed), len(samples.probed), keep_inputs=True)
    manifest = Manifest(
        samples=samples.count,
        shard_samples=options.shard_samples or MOST_SHARD_SAMPLES,
        dtype=str(options.dtype).removeprefix("torch."),
        taps={
            key: dataclasses.replace(tap, shape=tuple(probe.features[key].shape[1:]))
            for key, tap in zip(frozen.keys, frozen.stored_taps, strict=True)
        },
        teacher=type(frozen.model).__qualname__,  # without its module, which is __main__ in a script
        weights=weights_fingerprint(frozen.model),
        transform=samples.transform,
    )
    if options.shard_samples is None:
        _, ranks = options.share()
        fitting = SHARD_BYTES // max(1, manifest.sample_bytes)
        for_every_rank = -(-samples.count // ranks)
        default = max(1, min(MOST_SHARD_SAMPLES, fitting, for_every_rank))
        manifest = dataclasses.replace(manifest, shard_samples=default)
    return manifest, probe


def check_views(frozen: TappedTeacher, samples: Samples, probe: Answer) -> None:
    """An error if the same samples are others at a later visit: several, as some views change in one visit of ten; or
    if the teacher gives other features of the same input."""
    if probe.only_tensors:
        second = frozen(samples.batch(samples.probed), len(samples.probed), keep_inputs=True)
        same_input = largest_difference(probe.inputs, second.inputs) == 0
        if same_input and differ(probe_tensors(second), probe_tensors(probe), "features"):
            raise ValueError(
                "teacher gives other features of the same input at every call, in eval mode, too (dropout that is "
                "always on, random masks), so what is stored would be one of them: it must draw nothing in eval mode"
            )

    def changed() -> bool:
        batch = samples.batch(samples.probed)
        if probe.only_tensors:
            return largest_difference(probe.inputs, tensors_in(frozen.arguments(batch))) > 0
        # Arrays, images and texts: what the teacher makes of them, too.
        again = frozen(batch, len(samples.probed), keep_inputs=True)
        differs = differ(probe_tensors(again), probe_tensors(probe), "features")
        return differs or largest_difference(probe.inputs, again.inputs) > 0

    if any(changed() for _ in range(VISITS)):
        raise ValueError(
            "data gives another view of a sample at every visit, so the stored features would be of views that the "
            "student never sees: store one view of every sample, or several fixed ones (vkd_kernels.store.FixedViews)"
        )


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], *, replace: bool = True, **metadata: str) -> None:
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "building a FeatureStore needs safetensors: pip install 'vkd_kernels[store]'", name=error.name
        ) from error
    with writing(path, replace=replace) as partial:
        partial.write_bytes(save(tensors, metadata))


# ---- the folder ------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Made if it does not exist; an error if it is somebody else's."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a store needs a folder of its own")
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(name for name in names if not OWN_FILE.fullmatch(name))
    if MANIFEST not in names and foreign:
        raise FileExistsError(
            f"{folder} is not empty and holds no feature store (it holds {foreign[0]}): choose another folder"
        )


def check_fresh(folder: Path, manifest: Manifest, wanted: Manifest, probe: Answer) -> None:
    """An error if the store in the folder is of something else than is asked for now."""
    from safetensors.torch import load_file

    differences = manifest.differences(wanted)
    if not differences:
        keys = {tap: key for key, tap in manifest.taps.items()}  # others, where another number of taps is on a module
        features = {keys[tap]: probe.features[key] for key, tap in wanted.taps.items()}
        now, then = probe_tensors(probe._replace(features=features)), load_file(folder / PROBE)
        then = {name: tensor for name, tensor in then.items() if name in now or name.startswith("input")}
        if differ(now, then, "input"):
            differences = ["the teacher's input for the same samples differs: other data, or another transform"]
        elif differ(now, then, "features"):
            differences = ["features of the same samples differ: another pool, mask or configuration of the teacher"]
    if differences:
        raise ValueError(
            f"the store in {folder} was built from something else ({'; '.join(differences)}): choose another folder, "
            "or delete this one if nothing needs it any more"
        )


def check_all_taps(folder: Path, manifest: Manifest, frozen: TappedTeacher) -> None:
    """An error if shards that are missing need more than is asked for now."""
    lacking = [tap for tap in manifest.taps.values() if not any(tap.same_as(asked) for asked in frozen.stored_taps)]
    if lacking:
        raise ValueError(
            f"the store in {folder} is incomplete, and the shards that are missing need more taps: give "
            f"{'; '.join(map(str, lacking))}, too, to continue"
        )


def probe_tensors(probe: Answer) -> dict[str, torch.Tensor]:
    inputs = {f"input {i}": tensor for i, tensor in enumerate(probe.inputs)}
    features = {f"features {key}": tensor for key, tensor in probe.features.items()}
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in {**inputs, **features}.items()}


def differ(now: Mapping[str, torch.Tensor], then: Mapping[str, torch.Tensor], kind: str) -> bool:
    names = sorted(name for name in {*now, *then} if name.startswith(kind))
    if not all(name in now and name in then for name in names):
        return True
    return largest_difference([now[name] for name in names], [then[name] for name in names]) > PROBE_TOLERANCE


def largest_difference(now: Sequence[torch.Tensor], then: Sequence[torch.Tensor]) -> float:
    """Relative, over all tensors; infinite where shapes differ, or values that are not finite or no floating point.

    Two NaN are equal, and so are two Inf of one sign, as in additive masks.
    """
    largest = 0.0
    for a, b in zip(now, then, strict=True):
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            return math.inf
        if a.is_floating_point():
            a, b = as_float64(a), as_float64(b)
            equal = (a == b) | (a.isnan() & b.isnan())
            size = b.masked_fill(~b.isfinite(), 0).norm().clamp_min(1e-30)
            difference = ((a - b).masked_fill(equal, 0).norm() / size).item()
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
        elif not torch.equal(a, b):
            return math.inf
    return largest


def check_room(folder: Path, manifest: Manifest, missing: Sequence[int]) -> None:
    needed = sum(len(manifest.rows_of(shard)) for shard in missing) * manifest.sample_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the store needs {in_words(needed)} more in {folder}, where {in_words(free)} are free: choose another "
            "disk, a pool that keeps less, or a 16-bit dtype"
        )


def wait_for_others(folder: Path, manifest: Manifest, ranks: int) -> None:
    """Until the shards of all ranks are there. If nobody works on those that are missing, says so, and raises later."""
    seen, since, said = None, time.monotonic(), False
    while left := missing_shards(folder, manifest):
        seen, before = (left, signs_of_work(folder)), seen
        if seen != before:  # times are compared with one another: the clocks of other machines may differ
            since = time.monotonic()
        silence = time.monotonic() - since
        if silence > NOTABLE_SILENCE and not said:
            said = True
            print(f"still waiting: {why_it_waits(folder, left, ranks, silence)}", file=sys.stderr, flush=True)
        if silence > LONGEST_SILENCE:
            raise TimeoutError(why_it_waits(folder, left, ranks, silence))
        time.sleep(0.2)


def why_it_waits(folder: Path, left: Sequence[int], ranks: int, silence: float) -> str:
    owners = sorted({shard % ranks for shard in left})
    who = f"rank {owners[0]}" if len(owners) == 1 else f"ranks {', '.join(map(str, owners))}"
    return (
        f"no sign of work has come from the other ranks for {duration(silence)}; {len(left)} shards of {who} are "
        f"missing in {folder}. Every rank must call build, with a folder that all of them see; if only this process "
        "builds, pass rank=0, world_size=1"
    )
