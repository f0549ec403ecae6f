"""The loop of a training worker in one process without Ray: `python -m benchmarks.ray_cost_bare DIR key=value ...`."""

import sys

import torch

from bert4rec.config import load_config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.data.windows import Windows, training_windows
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import make_optimizers, train_epoch, validate


def main() -> None:
    directory, *overrides = sys.argv[1:]
    config = load_config(None, overrides)
    dataset = PreparedDataset(config.prepared_path)
    torch.manual_seed(config.data.seed)
    model = BERT4Rec(config.model, dataset.num_items, dataset.manifest.catalogue)
    sequences = Windows.from_sequences(dataset.sequences(config.data.memory_mb))
    windows = training_windows(sequences, config.data)
    optimizers = make_optimizers(model, config.training)
    scaler = torch.amp.GradScaler("cpu", enabled=False)  # type: ignore[attr-defined]
    for epoch in range(config.training.num_epochs):
        train_epoch(model, windows, config, epoch, optimizers, scaler)
        metrics = validate(model, sequences, config)
        model.save_pretrained(directory)
        torch.save([optimizer.state_dict() for optimizer in optimizers], f"{directory}/training_state.pt")
    print(f"val_ndcg@10 {metrics['val_ndcg@10']:.6f}")


if __name__ == "__main__":
    main()
