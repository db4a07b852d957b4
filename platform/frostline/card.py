"""The model card of a bundle: README.md, as the Hugging Face Hub reads one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from frostline.modality import reads_text
from frostline.trialspec import TrialSpec

METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "average_precision": "mAP",
    "nll": "NLL",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
}
KNOWN = {
    "classification": "Classes",
    "multilabel": "Labels, of which a sample may have any number",
    "regression": "Numbers",
}
SAID = {"classification": "labels and probabilities", "multilabel": "labels and probabilities", "regression": "numbers"}


def model_card(spec: TrialSpec, stages: Sequence[str], classes: Sequence[str], row: Mapping[str, Any]) -> str:
    """The card of a confirmation with this row; `stages` are the names of the backbone's, input to output."""
    config, data, data_task = spec.config, dataset_name(spec.data.path), spec.data.task
    noun = "text" if reads_text(spec.backbone.name) else "image"
    task = f"{noun}-{'regression' if data_task == 'regression' else 'classification'}"
    if noun == "text":
        sample = '("a text", "its second")' if spec.data.pair_column else '"a text"'
        shown = f"texts, cut to {spec.data.max_tokens} tokens, `{spec.backbone.pool}` pooling; `tokenizer.json` is beside this file"
    else:
        sample, side = '"image.png"', spec.data.image_size
        shown = f"RGB, {side} x {side} pixels, `{spec.data.fit}`; mean and deviation are in `bundle.json`"
    depth, metrics = row["freeze_depth"], [name for name in METRICS if f"test_{name}" in row]
    frozen = f"{depth} of {len(stages)} stages frozen" + (f" ({_code(stages[:depth])})" if depth else "")
    layer = f"an MLP of {config.head.hidden} units" if config.head.hidden else "linear"
    scores = [f"{row[f'test_{name}']:.4f}" for name in metrics]
    lines = [
        "---",
        "library_name: frostline",
        *([f"pipeline_tag: {task}"] if data_task != "regression" else []),  # the Hub has none for it
        f"tags: {json.dumps([task, 'transfer-learning', 'fine-tuning', 'frostline'])}",
        f"base_model: {json.dumps(spec.backbone.name)}",
        f"metrics: {json.dumps(metrics)}",
        "model-index:",
        f"- name: {json.dumps(spec.trial_id)}",
        "  results:",
        f"  - task: {json.dumps({'type': task})}",
        f"    dataset: {json.dumps({'name': data, 'type': data, 'split': 'test'})}",
        "    metrics:",
        *(f"    - {json.dumps({'type': name, 'value': round(row[f'test_{name}'], 6)})}" for name in metrics),
        "---",
        f"# {spec.trial_id}",
        "",
        f"`{_plain(spec.backbone.name)}` fine-tuned on `{_plain(data)}` with Frostline.",
        "",
        f"- **Strategy**: `{config.freeze.strategy}`: {frozen}, norm layers `{config.freeze.norm}`.",
        f"- **Head**: {layer}, after stage {row['head_depth']} of {len(stages)}.",
        f"- **Trained**: {row['trainable_params']:,} of {row['total_params']:,} parameters, on {row['n_train']:,} {noun}s for "
        f"{row['epochs']} epochs.",
        f"- **Input**: {shown}.",
        f"- **{KNOWN[data_task]}**: {len(classes)}: {_code(classes[:50])}{', …' if len(classes) > 50 else ''}.",
        "",
        "## Results",
        "",
        f"| split | n | {' | '.join(METRICS[name] for name in metrics)} |",
        f"|---|---|{'---|' * len(metrics)}",
        f"| test | {row['n_test']} | {' | '.join(scores)} |",
        "",
        f"One seed ({spec.seed}), scored once on test; the study's trials table has the others. Quote their mean and spread.",
        "",
        "## Use it",
        "",
        "```python",
        "import frostline",
        "",
        f'frostline.load_bundle("bundle").predict([{sample}])  # {SAID[data_task]}',
        "```",
        "",
        "## Get the same again",
        "",
        "The scores above, on the same hardware to the bit (the data as `bundle.json` names it):",
        "",
        f"    frostline predict bundle {_shell(data)} --split test --out predictions",
        "",
        "The training, from the data and the backbone; `bundle.json` holds the whole configuration, seeds included:",
        "",
        "```python",
        "from frostline.bundle import load_bundle",
        "from frostline.features import Feed",
        "from frostline.trial import run_trial",
        "from frostline.world import World",
        "",
        'spec = load_bundle("bundle").spec.model_copy(update={"cached": False, "start_stored": False})',
        "outcome = run_trial(spec, feed=Feed(), world=World.here(spec.resources), report=lambda _: True)",
        "```",
        "",
    ]
    return "\n".join(lines)


def dataset_name(path: str) -> str:
    """What a `data.path` is called, without the folders, credentials and options around it."""
    return path.partition("?")[0].rstrip("/").rpartition("/")[2].rpartition("@")[2] or "data"


def _plain(text: str) -> str:
    """Text that cannot leave a code span."""
    return "".join(char if char.isprintable() and char not in "`|" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{_plain(name)}`" for name in names)


def _shell(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9._/-]+", name) else "DATA"
