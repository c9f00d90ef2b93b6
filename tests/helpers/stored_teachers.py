"""A small teacher and its data, for tests of feature stores; as a command, a build that stops, for tests to kill.

python -m tests.helpers.stored_teachers FOLDER IMAGES
"""

import math
import sys
import time

import torch
from torch import nn
from torch.utils.data import Dataset

import vkd_kernels as vk

SAMPLES, SHARD, BATCH = 50, 8, 4
TAPS = [
    {"teacher": "0", "teacher_pool": "class_token"},
    {"teacher": "2", "teacher_pool": "tokens", "teacher_skip": 1},
    {"teacher": ""},
]


class Teacher(nn.Sequential):
    """Tokens (N, 5, 6) from images (N, 5, 4), and logits (N, 3). It counts images; may be slow; may stop."""

    def __init__(self, *, seconds=0.0, stops_after=math.inf):
        generator = torch.Generator().manual_seed(3)
        layers = [nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6), nn.Flatten(), nn.Dropout(0.5), nn.Linear(30, 3)]
        super().__init__(*layers)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        self.seconds, self.stops_after, self.images = seconds, stops_after, 0

    def forward(self, images):
        self.images += len(images)
        time.sleep(3600 if self.images > self.stops_after else self.seconds)  # an hour: until it is killed
        tokens = self[2](self[1](self[0](images)))
        return self[5](self[4](self[3](tokens)))


class Images(Dataset):
    """(image (5, 4), label, index)"""

    def __init__(self, samples=SAMPLES, transform=None):
        self.images = torch.randn(samples, 5, 4, generator=torch.Generator().manual_seed(7))
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return image if self.transform is None else self.transform(image), index % 3, index


def live_tokens(teacher, images):
    return teacher[2](teacher[1](teacher[0](images))).detach()


def build(folder, teacher=None, data=None, taps=({"teacher": "2", "teacher_pool": "tokens"},), **options):
    teacher = Teacher() if teacher is None else teacher
    data = Images() if data is None else data
    options = {"shard_samples": SHARD, "batch_size": BATCH, "progress": False, **options}
    return vk.FeatureStore.build(folder, teacher, data, list(taps), **options)


if __name__ == "__main__":
    build(sys.argv[1], Teacher(stops_after=int(sys.argv[2])), progress=True)
