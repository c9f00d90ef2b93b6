"""A plain training loop with timm models: one loss added, its parameters in the optimizer without weight decay."""

import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from vkd_kernels import OrthoProjLoss


def train(student, teacher, loader, *, epochs=1, lr=5e-4, weight_decay=0.05):
    """Trains the student on labels and on the teacher's features; returns the feature loss of every step."""
    teacher.eval().requires_grad_(False)
    distill = OrthoProjLoss(student.num_features, teacher.num_features, scale="match")
    spared = getattr(student, "no_weight_decay", set)()  # convolutional models have none to name
    groups = param_groups_weight_decay(student, weight_decay, no_weight_decay_list=spared)
    groups.append({"params": distill.parameters(), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=lr)
    losses = []
    student.train()
    for _ in range(epochs):
        for images, labels in loader:
            tokens = student.forward_features(images)
            patches = tokens[:, student.num_prefix_tokens :]
            with torch.no_grad():
                target = teacher.forward_features(images).mean((2, 3))
            feature_loss = distill(patches.mean(1), target)
            loss = F.cross_entropy(student.forward_head(tokens), labels) + feature_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(feature_loss.item())
    return losses


if __name__ == "__main__":  # random weights and images; give pretrained=True and your data to the same function
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    loader = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))] * 20
    losses = train(vit, timm.create_model("regnetx_002", num_classes=0), loader)
    print(f"feature loss {losses[0]:.3f} -> {losses[-1]:.3f}")
