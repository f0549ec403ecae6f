"""The model card: README.md of a model directory."""

import yaml

from bert4rec.config import Config
from bert4rec.data.dataset import ItemTable, Manifest
from bert4rec.data.features import FEATURES
from bert4rec.evaluation.protocols import ASKED
from bert4rec.model.network import BERT4Rec

CARD = "README.md"


def model_card(
    model: BERT4Rec, config: Config, manifest: Manifest, items: ItemTable, metrics: dict[str, float], name: str
) -> str:
    """Markdown: the data, the network, the metrics of this checkpoint, the settings, and how to read it.

    Parameters
    ----------
    metrics
        Of the epoch that the checkpoint is of.
    name
        Of the model directory.
    """
    num_parameters = model.num_parameters
    metadata = [name for name in (*FEATURES, "title") if getattr(config.model, f"use_{name}_emb")]
    example = [item.as_py() for item in items.ids[:3]]
    call = f"{example!r}, topk={min(5, len(items.ids))}"
    if config.model.time_parts:
        call += f", times={[f'2026-01-0{day}' for day in range(1, 1 + len(example))]!r}"
    files = [f"| `{file.name}` | {file.size:,} | `{file.sha256[:16]}…` |" for file in manifest.inputs]
    settings = config.model_dump(mode="json", include={"data", "model", "training", "evaluation"})
    settings["data"].pop("data_dir")  # says something of one machine, nothing of the model
    return "\n".join(
        [
            f"# {name}",
            "",
            "BERT4Rec ([arXiv 1904.06690](https://arxiv.org/abs/1904.06690)): from the items that a user had, in order,"
            " to scores of all items as the next one.",
            "",
            "```python",
            "from bert4rec import load",
            "",
            f'model = load("{name}")',
            f"print(model.recommend({call}))",
            "```",
            "",
            "Ids are those of the data. The package `bert4rec-ray` is needed, Ray is not running for it.",
            "",
            "## Network",
            "",
            f"{num_parameters:,} parameters: {config.model.num_layers} blocks of width {config.model.hidden_units}, "
            f"{config.model.num_heads} heads; reads the last {config.model.max_len - 1} items. "
            + (f"Metadata at the input: {', '.join(metadata)}." if metadata else "No metadata."),
            "",
            "## Data",
            "",
            f"`{config.data_name}`: {manifest.num_interactions:,} interactions of {manifest.num_users:,} users with "
            f"{manifest.num_items:,} items. " + _held_out(model),
            "",
            "| file | bytes | SHA-256 |",
            "| --- | ---: | --- |",
            *files,
            "",
            f"Dataset fingerprint `{manifest.fingerprint}`, catalogue fingerprint `{manifest.catalogue}`: the model "
            "scores data of the same catalogue only.",
            "",
            f"## Metrics of epoch {int(metrics['epoch'])}",
            "",
            _protocol(config),
            "",
            "| metric | value |",
            "| --- | ---: |",
            *(f"| {key} | {value:.4f} |" for key, value in metrics.items() if key.startswith(("val_", "train_loss"))),
            "",
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump(settings, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def _held_out(model: BERT4Rec) -> str:
    if model.trained_before is not None:
        return f"Training saw what happened before the Unix time {model.trained_before} alone."
    if model.held_out == 0:
        return "Trained on every interaction."
    last = "item" if model.held_out == 1 else f"{model.held_out} items"
    return f"Training did not see the last {last} of each user."


def _protocol(config: Config) -> str:
    if config.data.use_full_data:
        return "Trained on the full data: there is no validation, only the training loss."
    target = "last item" if config.data.holdout == 1 else "last item but one"
    if config.data.split == "temporal":
        target = "first item from that time on"
    seen = "without" if config.evaluation.exclude_seen else "with"
    query_time = config.evaluation.query_time
    asked = f", asked for {ASKED[query_time]} (query_time={query_time})" if config.model.time_parts else ""
    return (
        f"Validation: the {target} of each user with {config.data.min_interactions} or more interactions, ranked "
        f"among all items {seen} the user's seen ones{asked}."
    )
