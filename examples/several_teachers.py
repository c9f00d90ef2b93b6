"""Two teachers, one student: a small ViT learns from DINOv3 and SigLIP 2 at once, as RADIO and UNIC do.

python examples/several_teachers.py            # on the images below data/
python examples/several_teachers.py --random   # small random models and random images
"""

import sys

import timm
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import vkd_kernels as vk

STUDENT, DINO, SIGLIP = "vit_small_patch16_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224.v2_webli"


def distiller_of(student, dino, siglip, images):
    """Patches of both teachers and SigLIP's pooled vector; losses of different size are brought to one scale."""
    common = {"student": "norm", "student_skip": student.num_prefix_tokens, "scale": "match"}
    common |= {"loss": {"cosine": 0.9, "smooth_l1": 0.1}}
    patches = {**common, "student_pool": "tokens", "teacher_pool": "tokens", "resample": "student"}
    pairs = [
        {"teacher": "dino:norm", "teacher_skip": dino.num_prefix_tokens, "name": "dino", **patches},
        {"teacher": "siglip:norm", "name": "siglip", **patches},
        {"teacher": "siglip:attn_pool", "name": "image", "student_pool": "mean_tokens", **common},
    ]
    teachers = {"dino": dino, "siglip": siglip}
    return vk.FeatureDistiller(student, teachers, pairs, example_input=images, balance="running_mean")


def train(distiller, loader, *, lr=1e-3):
    """One epoch; returns the losses of every step, {name: number}."""
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=lr)
    distiller.train()
    report = []
    for images, _ in loader:  # normalized for the student; each teacher gets them as it expects them
        converted = {
            name: vk.renormalize(images, from_=distiller.student, to=teacher, size=images.shape[-2:])
            for name, teacher in distiller.teacher.items()
        }
        _, losses = distiller(images, teacher_input=converted)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        report.append({name: loss.item() for name, loss in losses.items()})
    return report


def load(random):
    """(student, DINOv3, SigLIP 2, loader)."""
    if random:
        sizes = {"depth": 2, "num_heads": 2, "img_size": 64}
        widths = {STUDENT: 32, DINO: 64, SIGLIP: 48}
        models = [timm.create_model(name, embed_dim=width, **sizes) for name, width in widths.items()]
        return *models, [(torch.randn(8, 3, 64, 64), None)] * 20
    student = timm.create_model(STUDENT, num_classes=0)
    normalize = v2.Normalize(student.pretrained_cfg["mean"], student.pretrained_cfg["std"])
    views = [v2.RandomResizedCrop(224), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    loader = torch.utils.data.DataLoader(ImageFolder("data", v2.Compose(views)), batch_size=64, shuffle=True)
    return student, *(timm.create_model(name, pretrained=True) for name in (DINO, SIGLIP)), loader


if __name__ == "__main__":
    student, dino, siglip, loader = load(random="--random" in sys.argv)
    report = train(distiller_of(student, dino, siglip, next(iter(loader))[0][:1]), loader)
    for name in ("dino", "siglip", "image"):
        print(f"{name} loss {report[0][name]:.3f} -> {report[-1][name]:.3f}")
    torch.save(student.state_dict(), "student.pt")
