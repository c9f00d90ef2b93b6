"""A detector's neck: two levels of a small feature pyramid learn from the same levels of a larger detector's.

    python examples/detector_neck.py            # Faster R-CNN, MobileNet from ResNet-50 (weights of COCO)
    python examples/detector_neck.py --random   # random weights

The images are random here: give ``train`` any loader of torchvision's detection format.
"""

import sys

import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn, fasterrcnn_resnet50_fpn

from vkd_kernels import FeatureDistiller

LEVELS = {"0": "2", "1": "3"}  # MobileNet's pyramid begins at stride 32, ResNet-50's at 4


def distiller_of(student, teacher):
    """``distiller(images, targets, teacher_input=batch)``: the teacher is a detector's backbone, neck included."""
    common = {"student": "backbone.fpn", "teacher": "fpn", "student_pool": "spatial", "teacher_pool": "spatial"}
    common |= {"dims": (256, 256), "resample": "teacher", "normalization": "batch_norm", "eps": 1e-3}
    pairs = [
        {"student_output": ours, "teacher_output": theirs, "name": f"level {ours}", **common}
        for ours, theirs in LEVELS.items()
    ]
    return FeatureDistiller(student, teacher.backbone, pairs)


def train(distiller, loader, *, lr=1e-3, feature_weight=1.0):
    """One epoch on the detector's own losses and on the pyramids; returns the feature loss of every step."""
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=lr)
    distiller.train()
    losses = []
    for images, targets in loader:
        batch = distiller.student.transform(images)[0].tensors  # resized, normalized, padded: what the student sees
        own, pyramid = distiller(images, targets, teacher_input=batch)
        optimizer.zero_grad()
        (sum(own.values()) + feature_weight * pyramid["total"]).backward()
        optimizer.step()
        losses.append(pyramid["total"].item())
    return losses


def scenes(count):
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
    targets = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    return [([torch.rand(3, 64, 64) for _ in range(2)], [targets] * 2) for _ in range(count)]


if __name__ == "__main__":
    if "--random" in sys.argv:
        options = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    else:
        options = {"weights": "DEFAULT"}
    student, teacher = fasterrcnn_mobilenet_v3_large_fpn(**options), fasterrcnn_resnet50_fpn(**options)
    losses = train(distiller_of(student, teacher), scenes(4))
    print(f"feature loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    torch.save(student.state_dict(), "detector.pt")
