"""A plain PyTorch BERT4Rec, as it is usually written: `python -m benchmarks.plain WORKLOAD`.

The same arithmetic as ours at the targets, but every sequence is padded to max_len, logits are made at every position,
and a Dataset masks one row at a time. No dropout inside attention and feed-forward, as in ours.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import Histories, Meter, Workload, report


class PlainBERT4Rec(nn.Module):
    """Item and position embeddings, nn.TransformerEncoder, and logits at all positions."""

    def __init__(self, workload: Workload, num_items: int) -> None:
        super().__init__()
        width = workload.hidden
        self.item_embedding = nn.Embedding(num_items + 2, width, padding_idx=0)
        self.position_embedding = nn.Embedding(workload.max_len, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(workload.dropout)
        layer = nn.TransformerEncoderLayer(
            width, workload.num_heads, 4 * width, workload.dropout, activation="gelu", batch_first=True
        )
        layer.self_attn.dropout = 0.0
        layer.dropout = nn.Identity()  # type: ignore[assignment]
        self.encoder = nn.TransformerEncoder(layer, workload.num_layers, enable_nested_tensor=False)
        self.output_transform = nn.Linear(width, width)
        self.output_bias = nn.Parameter(torch.zeros(num_items))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L] -> logits [B, L, V]."""
        position = torch.arange(tokens.shape[1])
        x = self.item_embedding(tokens) + self.position_embedding(position)
        x = self.embedding_norm(self.dropout(x))
        x = self.encoder(x, src_key_padding_mask=tokens == 0)
        x = F.gelu(self.output_transform(x))
        return F.linear(x, self.item_embedding.weight[1:-1], self.output_bias)


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the targets; labels [B, L], 0 for none."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten() - 1, ignore_index=-1)


class MaskedSequences(Dataset[tuple[Tensor, Tensor]]):
    """The masked-item task, a row at a time."""

    def __init__(self, sequences: list[list[int]], workload: Workload, num_items: int) -> None:
        self.sequences = sequences
        self.max_len = workload.max_len
        self.mask_prob = workload.mask_prob
        self.num_items = num_items

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """[L] tokens and [L] labels, padded on the left."""
        tokens, labels = [], []
        for item in self.sequences[index][-self.max_len :]:
            if random.random() < self.mask_prob:
                how = random.random()
                tokens.append(self.num_items + 1 if how < 0.8 else item if how < 0.9 else self._random_item())
                labels.append(item)
            else:
                tokens.append(item)
                labels.append(0)
        padding = [0] * (self.max_len - len(tokens))
        return torch.tensor(padding + tokens), torch.tensor(padding + labels)

    def _random_item(self) -> int:
        return random.randint(1, self.num_items)


def train(workload: Workload, histories: Histories) -> dict[str, float]:
    bounds = zip(histories.offsets[:-1], histories.offsets[1:], strict=True)
    sequences = [histories.items[begin:end].tolist() for begin, end in bounds]
    num_items = len(histories.item_ids)
    loader = DataLoader(
        MaskedSequences(sequences, workload, num_items),
        batch_size=workload.batch_size,
        shuffle=True,
        num_workers=workload.loader_workers,
        persistent_workers=workload.loader_workers > 0,
    )
    model = PlainBERT4Rec(workload, num_items).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    meter, is_over = Meter(workload.seconds), False
    while not is_over:
        for tokens, labels in loader:
            optimizer.zero_grad()
            plain_loss(model(tokens), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if is_over := meter.add((tokens > 0).sum(1)):
                break
    return meter.result()


def main() -> None:
    workload = Workload.from_command_line()
    torch.set_num_threads(workload.threads)
    torch.manual_seed(workload.seed)
    random.seed(workload.seed)
    report(**train(workload, Histories.load(workload.data)))


if __name__ == "__main__":
    main()
