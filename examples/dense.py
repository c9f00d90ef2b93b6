"""Dense distillation: every position of a small convolutional network learns from a vision transformer's patches.

python examples/dense.py            # ConvNeXt-Atto learns from DINOv3 ViT-S/16, on the images below data/
python examples/dense.py --random   # random weights and images; any other student by --student resnet18
"""

import argparse

import timm
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from vkd_kernels import FeatureDistiller

TAPS = {"convnext_atto": "stages.2", "resnet18": "layer3"}  # maps of stride 16, as the patches are


def distiller_of(student, teacher, tap, images):
    """The map of one module of the student against the teacher's patch tokens, resampled where the grids differ."""
    pair = {"student": tap, "student_pool": "spatial", "teacher": "norm", "teacher_pool": "tokens", "name": "dense"}
    pair |= {"teacher_skip": teacher.num_prefix_tokens, "resample": "student", "scale": "match"}
    return FeatureDistiller(student, teacher, [pair], example_input=images)


def train(distiller, loader, *, epochs=1, lr=1e-3, weight_decay=0.05):
    """Trains on the features alone; returns the loss of every step. Labels, if any, are left to your own loss."""
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay), lr=lr)
    distiller.train()
    losses = []
    for _ in range(epochs):
        for images, _ in loader:
            _, step = distiller(images)
            optimizer.zero_grad()
            step["total"].backward()
            optimizer.step()
            losses.append(step["dense"].item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--student", choices=TAPS, default="convnext_atto")
    given = parser.parse_args()
    student = timm.create_model(given.student, pretrained=not given.random)
    if given.random:
        small = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64}
        teacher = timm.create_model("vit_small_patch16_dinov3", **small)
        loader = [(torch.randn(8, 3, 64, 64), torch.zeros(8))] * 20
    else:
        teacher = timm.create_model("vit_small_patch16_dinov3", pretrained=True)
        config = timm.data.resolve_model_data_config(teacher)  # the student's mean and std are the same
        normalize = v2.Normalize(config["mean"], config["std"])
        steps = [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
        data = ImageFolder("data", v2.Compose([*steps, normalize]))
        loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, num_workers=4)
    distiller = distiller_of(student, teacher, TAPS[given.student], next(iter(loader))[0][:1])
    losses = train(distiller, loader)
    print(f"dense loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    torch.save(student.state_dict(), f"{given.student}.pt")
