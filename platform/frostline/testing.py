"""Small real parts for tests: a convolutional backbone, an image folder, a job; a text encoder, a table of texts, a job of these.
Import it from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from frostline.jobfile import parse_job
from frostline.spec import Job, Task

TOY_BACKBONE = "python:frostline.testing:toy_backbone"


class ToyNet(nn.Module):
    """A stem, two convolutional blocks with batch norm and dropout, and a pooled projection of 24 features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block1 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1))
        self.block2 = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Dropout(0.1))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, 24)."""
        return self.pool(self.block2(self.block1(self.stem(images))))


def toy_backbone() -> dict[str, Any]:
    """The same random weights every time, in three stages; see `frostline.backbone` for what such a function answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ToyNet()
    return {"module": net, "stages": [(name, [name]) for name in ("stem", "block1", "block2")], "image_size": 16}


def image_folder(root: Path, classes: Sequence[str] = ("bars", "discs"), per_class: int = 12, side: int = 24) -> Path:
    """Write a folder of PNG files, a directory per class: noisy bars or discs of the class's own colour."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            x, y = rng.uniform(0.3, 0.7, 2)
            shape = abs(columns - x) < 0.15 if number % 2 == 0 else (columns - x) ** 2 + (rows - y) ** 2 < 0.05
            pixels = rng.integers(0, 60, (side, side, 3))
            pixels[shape] += np.array([180, 60 * (number % 3), 20 * (number % 7)])
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03}.png")
    return root


SHAPES = ("bar", "disc", "frame")


def target_table(path: Path, task: Task, count: int = 60, side: int = 24) -> Path:
    """Write a Parquet table of noisy PNG images: with `multilabel` of any of SHAPES, with `regression` of a disc, the label being its
    radius in pixels."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    edges = np.minimum(np.minimum(rows, columns), side - 1 - np.maximum(rows, columns))
    images, labels = [], []
    for number in range(count):
        x, y = rng.uniform(0.3 * side, 0.7 * side, 2)
        radius = rng.uniform(2, side / 3) if task == "regression" else side / 6
        disc = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        masks = {"bar": abs(rows - y) < 2, "disc": disc, "frame": edges < 2}
        shown = ["disc"] if task == "regression" else [s for bit, s in enumerate(SHAPES) if number >> bit & 1]
        pixels = rng.integers(0, 60, (side, side, 3))
        for channel, shape in enumerate(SHAPES):
            pixels[..., channel] += 150 * (masks[shape] & (shape in shown))
        file = BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
        labels.append(float(radius) if task == "regression" else shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


WORDS = {
    "harbour": ("ship", "anchor", "tide", "sail", "gull"),
    "kitchen": ("bread", "oven", "salt", "spoon", "apple"),
    "garden": ("seed", "rain", "spade", "rose", "worm"),
}
SHARED = ("the", "a", "and", "is", "was", "old", "small", "near", "with", "never")


def text_encoder(root: Path, **config: Any) -> str:
    """Write the folder of a random BERT of three layers and 16 features, with a tokenizer that knows the words of `text_rows`;
    answers its name as a backbone. Needs the extra `text`."""
    import tokenizers
    import transformers
    from tokenizers.processors import TemplateProcessing

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SHARED, *(word for own in WORDS.values() for word in own)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(words[:4])
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    root.mkdir(parents=True)
    tokenizer.save(str(root / "tokenizer.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    kept = {"vocab_size": len(words), "max_position_embeddings": 64, **sizes, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformers.BertModel(transformers.BertConfig(**kept)).save_pretrained(root)
    return f"text/{root}"


def text_rows(per_class: int = 20, seed: int = 0) -> list[dict[str, str]]:
    """Texts of 2 to 12 words of three classes, each with at least one word of its own, no two alike."""
    rng = np.random.default_rng(seed)
    rows: dict[str, str] = {}
    for name, own in WORDS.items():
        while sum(label == name for label in rows.values()) < per_class:
            words = [*rng.choice(own, rng.integers(1, 4)), *rng.choice(SHARED, rng.integers(1, 10))]
            rows[" ".join(rng.permutation(words).tolist())] = name
    return [{"text": text, "label": label} for text, label in rows.items()]


def text_table(path: Path, per_class: int = 20, seed: int = 0) -> Path:
    """Write `text_rows` as JSON Lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in text_rows(per_class, seed)))
    return path


def text_job(results: Path, overrides: Sequence[str] = (), **sections: Any) -> Job:
    """`toy_job` on texts: its encoder and data are written beside the study."""
    folder, table = results.parent / "encoder", results.parent / "texts.jsonl"
    if not folder.is_dir():
        text_encoder(folder)
        text_table(table)
    data = {"path": str(table), "per_class": 10, "max_tokens": 16}
    texts = {"data": data, "backbone": {"name": f"text/{folder}"}, "train": {"epochs": 3, "batch_size": 16}}
    return toy_job(results, overrides, **{**texts, **sections})


def toy_job(results: Path, overrides: Sequence[str] = (), **sections: Any) -> Job:
    """A search of seconds: digits at 16 pixels under the toy backbone, 6 trials of up to 3 epochs, 2 confirmations."""
    raw = {
        "name": "toy",
        "results": str(results),
        "data": {"path": "digits", "image_size": 16, "per_class": 10},
        "backbone": {"name": TOY_BACKBONE, "weights": "random"},
        "train": {"epochs": 3, "batch_size": 32},
        "search": {"trials": 6, "startup_trials": 3},
        "confirm": {"seeds": 2},
        "arms": {
            "freeze": {
                "strategy": "freeze_depth",
                "space": {
                    "freeze.depth": "all",
                    "head.hidden": [0, 16],
                    "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
                    "train.head_lr": {"low": 1e-3, "high": 1e-1, "log": True},
                },
            }
        },
    }
    return parse_job({**raw, **sections}, overrides)


def toy_training(results: Path, overrides: Sequence[str] = (), **sections: Any) -> Job:
    """A training of a second: what `toy_job` searches, without its arms."""
    raw = toy_job(results).model_dump(mode="json", exclude_unset=True)
    kept = {key: value for key, value in raw.items() if key not in ("arms", "search", "confirm")}
    return parse_job({**kept, **sections}, overrides)
