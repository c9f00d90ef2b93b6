"""A Lightning module: student and loss are its submodules, so it trains, moves, shards and saves both."""

import lightning
import torch
import torch.nn.functional as F
import torchvision

from vkd_kernels import OrthoProjLoss


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, *, student_dim, teacher_dim, lr=1e-3, weight_decay=0.05):
        super().__init__()
        self.student, self.distill = student, OrthoProjLoss(student_dim, teacher_dim, scale="match")
        self.teacher = teacher.requires_grad_(False).eval()  # Lightning leaves it in this mode
        self.lr, self.weight_decay = lr, weight_decay

    def training_step(self, batch, _):
        images, labels = batch
        features = self.student.avgpool(self.student.features(images)).flatten(1)
        with torch.no_grad():
            target = self.teacher.avgpool(self.teacher.features(images)).flatten(1)
        feature_loss = self.distill(features, target)
        self.log("feature_loss", feature_loss)
        return F.cross_entropy(self.student.classifier(features), labels) + feature_loss

    def configure_optimizers(self):
        groups = [
            {"params": self.student.parameters(), "weight_decay": self.weight_decay},
            {"params": self.distill.parameters(), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr)


if __name__ == "__main__":  # random weights and images; give weights="DEFAULT" and your data to the same module
    student, teacher = torchvision.models.mobilenet_v3_small(num_classes=10), torchvision.models.efficientnet_b0()
    data = torch.utils.data.TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    trainer = lightning.Trainer(max_epochs=5, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    module = Distillation(student, teacher, student_dim=576, teacher_dim=1280)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
    print(f"feature loss at the end {trainer.callback_metrics['feature_loss']:.3f}")
