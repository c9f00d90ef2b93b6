"""Data-parallel training: ``torchrun --nproc-per-node=8 examples/ddp_loop.py``; alone, it trains on one device.

The loss is a part of the module that DDP wraps. Beside ``DDP(student)`` its projection would train on every rank by
itself; where it must stand beside, wrap it too: ``DDP(OrthoProjLoss(..., process_group=...))``.
"""

import os
from contextlib import nullcontext
from itertools import islice

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vkd_kernels import OrthoProjLoss


class Distilled(nn.Module):
    def __init__(self, student, teacher_dim):
        super().__init__()
        group = dist.group.WORLD if dist.is_initialized() else None
        self.student = student
        self.distill = OrthoProjLoss(student.num_features, teacher_dim, scale="match", process_group=group)

    def forward(self, images, labels, target):
        tokens = self.student.forward_features(images)
        feature_loss = self.distill(tokens[:, self.student.num_prefix_tokens :].mean(1), target)
        return F.cross_entropy(self.student.forward_head(tokens), labels) + feature_loss

    def parameter_groups(self, weight_decay):
        spared = getattr(self.student, "no_weight_decay", set)()  # convolutional models have none to name
        groups = param_groups_weight_decay(self.student, weight_decay, no_weight_decay_list=spared)
        return [*groups, {"params": self.distill.parameters(), "weight_decay": 0.0}]


def train(model, teacher, optimizer, loader, *, accumulate=1):
    """One epoch; ``accumulate`` micro-batches a step, or what is left at the end. Returns this rank's losses."""
    model.train()
    batches, losses = iter(loader), []
    while step := list(islice(batches, accumulate)):
        total = sum(len(images) for images, _ in step)
        for index, (images, labels) in enumerate(step):
            last = index == len(step) - 1  # the ranks' gradients are reduced once a step
            with torch.no_grad():
                target = teacher.forward_features(images).mean((2, 3))
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = model(images, labels, target)
                (loss * len(images) / total).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def accuracy(student, loader):
    student.eval()
    hits, count = 0, 0
    for images, labels in loader:
        hits += (student(images).argmax(1) == labels).sum()
        count += len(labels)
    return float(hits / count)


def main(checkpoint="build/ddp.pt"):  # random weights and images; give pretrained=True and your data
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        dist.init_process_group()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(rank)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    teacher = timm.create_model("regnetx_002", num_classes=0).to(device).eval().requires_grad_(False)
    distilled = Distilled(vit, teacher.num_features).to(device)
    model = DistributedDataParallel(distilled) if dist.is_initialized() else distilled
    optimizer = torch.optim.AdamW(distilled.parameter_groups(weight_decay=0.05), lr=5e-4)
    if os.path.exists(checkpoint):  # all ranks go on from where rank 0 was
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        distilled.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    loader = [(torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device))] * 8
    for epoch in range(3):
        losses = train(model, teacher, optimizer, loader, accumulate=2)
        if rank == 0:
            os.makedirs(os.path.dirname(checkpoint), exist_ok=True)
            torch.save({"model": distilled.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
            print(f"epoch {epoch}: loss {losses[-1]:.3f}, accuracy {accuracy(distilled.student, loader):.2f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
