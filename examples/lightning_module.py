"""A Lightning module: student and loss are its submodules, so it trains, moves, shards, saves and resumes both.

``training_step`` returns sums, and the gradient is divided by the number of images in all micro-batches of all ranks
before the step: ``accumulate_grad_batches``, several devices and a last batch that is smaller change nothing.
"""

import lightning
import torch
import torch.nn.functional as F
import torchvision

from vkd_kernels import OrthoProjLoss


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, *, student_dim, teacher_dim, lr=1e-3, weight_decay=0.05):
        super().__init__()
        self.student = student
        self.distill = OrthoProjLoss(student_dim, teacher_dim, scale="match", reduction="sum")
        self.teacher = teacher.requires_grad_(False).eval()  # Lightning leaves it in this mode
        self.lr, self.weight_decay, self.images = lr, weight_decay, 0

    def losses(self, batch):
        """(sum over the images of the student's own loss, that of the feature loss)."""
        images, labels = batch
        features = self.student.avgpool(self.student.features(images)).flatten(1)
        with torch.no_grad():
            target = self.teacher.avgpool(self.teacher.features(images)).flatten(1)
        task = F.cross_entropy(self.student.classifier(features), labels, reduction="sum")
        return task, self.distill(features, target) / target.shape[1]

    def training_step(self, batch, _):
        task, feature_loss = self.losses(batch)
        self.images += len(batch[0])
        self.log("feature_loss", feature_loss / len(batch[0]), batch_size=len(batch[0]))
        return task + feature_loss

    def on_before_optimizer_step(self, optimizer):
        images = self.trainer.strategy.reduce(torch.tensor(float(self.images), device=self.device), reduce_op="sum")
        # Lightning has divided by the number of micro-batches, and DDP by that of ranks.
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / images
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        self.images = 0

    def validation_step(self, batch, _):
        task, feature_loss = self.losses(batch)
        self.log("val_loss", (task + feature_loss) / len(batch[0]), batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self):
        groups = [
            {"params": self.student.parameters(), "weight_decay": self.weight_decay},
            {"params": self.distill.parameters(), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr)


if __name__ == "__main__":  # random weights and images; give weights="DEFAULT" and your data to the same module
    student, teacher = torchvision.models.mobilenet_v3_small(num_classes=10), torchvision.models.efficientnet_b0()
    data = torch.utils.data.TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=2, default_root_dir="build/lightning", logger=False, log_every_n_steps=1
    )
    module = Distillation(student, teacher, student_dim=576, teacher_dim=1280)
    trainer.fit(module, loader, loader)  # ckpt_path="last" goes on where a run was stopped
    print(f"feature loss at the end {trainer.callback_metrics['feature_loss']:.3f}")
