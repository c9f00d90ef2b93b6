"""A loop of one's own with ``accelerate``: gradient accumulation that is one large batch, saving, resuming, evaluation.

Alone or under ``accelerate launch`` / ``torchrun``. The losses are sums, divided by the number of labels and of tokens
in all micro-batches of all ranks: sentences of any length weigh as in one batch.
"""

from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from huggingface_trainer import Distilled, count
from transformers import BertConfig, BertForMaskedLM


def teachers_features(teacher, batch):
    with torch.no_grad():
        known = {name: value for name, value in batch.items() if name != "labels"}
        return teacher(**known, output_hidden_states=True).hidden_states[-1]


def counts_of(accelerator, batches):
    """Labels and tokens of the average rank in these batches: DDP, and ``reduction="mean"``, divide by the ranks."""
    counts = [count(batch["labels"], batch["attention_mask"]) for batch in batches]
    local = torch.stack([torch.stack([c["labels"], c["tokens"]]) for c in counts]).sum(0)
    labels, tokens = accelerator.reduce(local, reduction="sum") / accelerator.num_processes
    return {"labels": labels, "tokens": tokens}


def train(accelerator, model, optimizer, loader, teacher, *, micro_batches=1):
    """One epoch over a prepared loader; returns the loss of every step, the mean over all ranks."""
    model.train()
    batches, losses = iter(loader), []
    while step := list(islice(batches, micro_batches)):
        counts, total = counts_of(accelerator, step), 0.0
        for index, batch in enumerate(step):
            with accelerator.no_sync(model) if index < len(step) - 1 else nullcontext():
                targets = teachers_features(teacher, batch)
                loss = model(targets=targets, counts=counts, **batch)["loss"]
                accelerator.backward(loss)
                total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total, reduction="mean").item())
    return losses


@torch.no_grad()
def evaluate(accelerator, model, loader, teacher):
    """The loss over all batches of all ranks, as of one batch: the loader is read twice, to count first."""
    model.eval()
    counts = counts_of(accelerator, loader)
    losses = [model(targets=teachers_features(teacher, batch), counts=counts, **batch)["loss"] for batch in loader]
    return accelerator.reduce(torch.stack(losses).sum(), reduction="mean").item()


def optimizer_of(model, *, lr=1e-3, weight_decay=0.05):
    projection = {id(parameter) for parameter in model.distill.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in projection]
    groups = [{"params": others}, {"params": model.distill.parameters(), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


if __name__ == "__main__":  # random weights and sentences; give from_pretrained(...) models to the same functions
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    model = Distilled(BertForMaskedLM(BertConfig(hidden_size=32, intermediate_size=64, **small)), teacher_dim=64)
    teacher = BertForMaskedLM(BertConfig(hidden_size=64, intermediate_size=128, **small))
    mask = torch.arange(12) < torch.randint(4, 13, (64, 1))
    ids = torch.randint(100, (64, 12))
    fields = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    data = [{name: value[i] for name, value in fields.items()} for i in range(64)]
    accelerator = Accelerator()
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    teacher = teacher.to(accelerator.device).eval()
    for epoch in range(4):
        losses = train(accelerator, model, optimizer, loader, teacher, micro_batches=2)
        accelerator.save_state("build/accelerate")  # accelerator.load_state("build/accelerate") goes on from it
        value = evaluate(accelerator, model, loader, teacher)
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.3f}, evaluated {value:.3f}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).student.save_pretrained("build/student")
