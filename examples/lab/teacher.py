"""Let a small student learn from a teacher and few images, with the teacher's heatmaps and without.

    python -m lab teacher --seeds 0 1 2

The teacher is trained with cross-entropy on all of the built-in images; a teacher that is there is not trained again.

Parchami-Araghi et al., Good Teachers Explain: Explanation-Enhanced Knowledge Distillation (ECCV 2024).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cgc_reg import GradCAM, RandomResizedCropFlip, content_heatmap, mse_consistency
from lab import train
from lab.checkpoint import load_checkpoint
from lab.image_data import Data, load_shapes, share_of_each_class
from lab.loaders import seed_everything
from lab.measures import Mean, accuracy
from lab.models import SmallResNet, load_model
from lab.study_report import interval, spread, table

TEACHER = (
    "--data shapes --arch small_resnet --cross-entropy-views 2 --crop-scale 0.5 --lr 0.1 --lam 0 --epochs {epochs} "
    "--validate-every {epochs} --workers 0 --seed {seed} --out {out} --resume"
)
G = GradCAM("layer4")  # of teacher and student
CROP = RandomResizedCropFlip((0.5, 1.0))  # both see the same view
MEASURES = {
    "agreement": "predicts as its teacher",
    "similarity": "similarity of its heatmaps and the teacher's",
    "top1": "top-1 accuracy",
    "content_heatmap": "content heatmap",
}


def main(argv: list[str] | None = None) -> None:
    """Train a teacher and two students for each seed, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m lab teacher", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fraction", type=float, default=0.1, help="of the images, for the students")
    parser.add_argument("--width", type=int, default=8, help="channels of a student's first block; the teacher has 16")
    parser.add_argument("--lam", type=float, default=1.0, help="weight of the heatmaps")
    parser.add_argument("--epochs", type=int, default=24, help="of the teacher")
    parser.add_argument("--student-epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/teacher"), help="folder of the teachers")
    args = parser.parse_args(argv)
    students: dict[str, list[dict[str, float]]] = {"distillation": [], "+ heatmaps": []}
    for seed in args.seeds:
        out = args.out / str(seed)
        train.main(TEACHER.format(epochs=args.epochs, seed=seed, out=out).split())
        teacher = load_model(load_checkpoint(out / "cross-entropy" / "last.pt"))
        data = load_shapes(image_size=64, seed=seed)
        for found, lam in zip(students.values(), (0.0, args.lam), strict=True):
            found.append(measured(taught(teacher, data, args, lam, seed), teacher, data))
    rows = [
        [name, *(spread([one[measure] for one in found]) for measure in MEASURES)] for name, found in students.items()
    ]
    without, with_heatmaps = students.values()
    pairs = list(zip(without, with_heatmaps, strict=True))
    rows.append(["difference", *(interval([b[measure] - a[measure] for a, b in pairs]) for measure in MEASURES)])
    print(table(["student", *MEASURES.values()], rows))


def taught(teacher: nn.Module, data: Data, args: argparse.Namespace, lam: float, seed: int) -> nn.Module:
    """Train a student on what the teacher says and shows of a few images."""
    seed_everything(seed)
    few = Subset(data.train, share_of_each_class(data.labels, args.fraction, seed=seed))
    loader = DataLoader(few, min(64, len(few)), shuffle=True, drop_last=True)
    student = SmallResNet(len(data.classes), args.width)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=args.student_epochs * len(loader) + 1)
    for _ in tqdm(range(args.student_epochs), f"seed {seed}, heatmaps weigh {lam:g}", leave=False, disable=None):
        for images, *_ in loader:
            x = CROP.sample(len(images), tuple(images.shape[2:]))(images)
            with torch.no_grad():
                shown = G(teacher, x)
            seen = G(student, x, target=shown.target)
            said = F.kl_div(seen.logits.log_softmax(dim=1), shown.logits.softmax(dim=1), reduction="batchmean")
            loss = said + lam * mse_consistency(seen.heatmap, shown.heatmap)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return student.eval()


@torch.no_grad()
def measured(student: nn.Module, teacher: nn.Module, data: Data) -> dict[str, float]:
    """Put a student beside its teacher on the validation images, each for the class that the teacher predicts."""
    total = Mean()
    for x, y, masks in DataLoader(data.validation, 64):
        shown = G(teacher, x)
        seen = G(student, x, target=shown.target)
        total.add(
            len(x),
            agreement=accuracy(seen.logits, shown.target, 1),
            similarity=F.cosine_similarity(seen.heatmap.flatten(1), shown.heatmap.flatten(1)).mean(),
            top1=accuracy(seen.logits, y, 1),
            content_heatmap=content_heatmap(seen.heatmap, masks).nanmean(),
        )
    return total.averages()
