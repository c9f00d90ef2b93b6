"""A program for torchrun: examples as they are, and the first step of training stacks, one after the other.

    torchrun --nproc-per-node=2 -m tests.helpers.torchrun_stacks FOLDER ddp_loop accelerate_loop trainer lightning

A stack takes a step of plain gradient descent with a learning rate of 1 on this rank's share of eight sentences or
images. Rank 0 writes what the step changed, {name: difference}, into FOLDER/trainer.pt, and what an example printed
into FOLDER/ddp_loop.txt; test_integrations_torchrun.py reads them. One launch for all: importing the libraries takes
longer than training.
"""

import contextlib
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.stacks import EXAMPLES, bert, example, sentences

LENGTHS = [2, 12, 3, 7, 12, 1, 5, 9]
Step = dict[str, torch.Tensor]


def changed(model: nn.Module, before: Step) -> Step:
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def parameters_of(model: nn.Module) -> Step:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def text_models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return example("huggingface_trainer").Distilled(bert(16, "BertForMaskedLM"), 24), bert(24, "BertForMaskedLM").eval()


def trainer(folder: Path, batch_size: int, micro_batches: int) -> Step:
    import transformers

    class InOrder(example("huggingface_trainer").DistillationTrainer):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model, teacher = text_models()
    before = parameters_of(model)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=micro_batches,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    InOrder(model, arguments, train_dataset=sentences(LENGTHS), teacher=teacher).train()
    return changed(model, before)


def accelerate(folder: Path, batch_size: int, micro_batches: int) -> Step:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, teacher = text_models()
    before = parameters_of(model)
    loader = torch.utils.data.DataLoader(sentences(LENGTHS), batch_size=batch_size)
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader)
    example("accelerate_loop").train(accelerator, *prepared, teacher, micro_batches=micro_batches)
    return changed(model, before)


def lightning(folder: Path, batch_size: int, micro_batches: int) -> Step:
    import lightning as pl

    from tests.modules.test_integrations_lightning import small_module

    module, data = small_module(images=8)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1.0)
    before = parameters_of(module)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=1,
        accumulate_grad_batches=micro_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=batch_size))
    return changed(module, before)


STACKS = {"trainer": trainer, "accelerate": accelerate, "lightning": lightning}


def ddp_loop() -> None:
    """Twice, the second run from the checkpoint of the first. Under torchrun a group can't be set up a second time."""
    with mock.patch.object(dist, "destroy_process_group"):
        example("ddp_loop").main()
        with mock.patch.object(dist, "init_process_group"):
            example("ddp_loop").main()


def accelerate_loop() -> None:
    example("huggingface_trainer")  # which the loop imports
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")


LOOPS: dict[str, Callable[[], None]] = {"ddp_loop": ddp_loop, "accelerate_loop": accelerate_loop}


def main(folder: Path, names: list[str]) -> None:
    is_first = os.environ["RANK"] == "0"
    os.chdir(folder)
    for name in names:
        if name in LOOPS:
            with open(f"{name}.txt" if is_first else os.devnull, "w") as file, contextlib.redirect_stdout(file):
                LOOPS[name]()
        else:
            step = STACKS[name](folder, batch_size=2, micro_batches=2)
            if is_first:
                torch.save(step, f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
