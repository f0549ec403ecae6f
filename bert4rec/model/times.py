"""What the network reads of times (`model.time_encoding`).

A masked position reads the time of its own item. With causal attention, a place reads the time of the next item, which
it is asked for, and others see it at the time of its own item.

Shapes: S positions of a packed batch, B users, L positions, M queried positions a user, H heads, W width of a head.
"""

import math

import torch
from torch import Tensor, nn

from bert4rec.config import ModelConfig

SHORTEST, LONGEST = 60, 365 * 86_400
"""Seconds of the shortest and the longest period of time-rotary."""
OCTAVES = 32
"""Gaps are told apart by floor(log2(seconds + 1)), up to 31, which begins at 68 years."""
HOURS, DAYS = 24, 7


class TimeEncoding(nn.Module):
    """Embeddings of times, and what attention adds or turns by times. It reads `Batch.times`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        parts, width = config.time_parts, config.hidden_units
        self.turns_by_time = "rotary" in parts
        if self.turns_by_time:
            periods = rotary_periods(width // config.num_heads // 4)
            self.register_buffer("periods", periods, persistent=False)
        self.register_buffer("usual_gap", torch.zeros((), dtype=torch.int64))  # seconds; training sets it
        self.gap = nn.Embedding(1 + OCTAVES, width) if "gap" in parts else None
        self.hour = nn.Embedding(HOURS, width) if "calendar" in parts else None
        self.day = nn.Embedding(DAYS, width) if "calendar" in parts else None
        self.bias: nn.Parameter | None = None
        if "bias" in parts:
            # By layer, octave of the time between (those of later items come second), head.
            self.bias = nn.Parameter(torch.zeros(config.num_layers, 2 * OCTAVES, config.num_heads))

    def embedded(self, times: Tensor, gaps: Tensor) -> Tensor | None:
        """[..., D] to add to the input vectors, or None.

        Parameters
        ----------
        times : Tensor
            [...] int64 Unix seconds.
        gaps : Tensor
            [...] int64 seconds since the item before in the row, -1 where there is none.
        """
        vectors = []
        if self.gap is not None:
            vectors.append(self.gap(torch.where(gaps < 0, 0, 1 + octave(gaps.clamp(min=0)))))
        if self.hour is not None and self.day is not None:
            vectors.append(
                self.hour(times // 3600 % HOURS) + self.day((times // 86_400 + 3) % DAYS)
            )  # 1970: a Thursday
        return sum(vectors[1:], vectors[0]) if vectors else None

    def turns(self, times: Tensor) -> Tensor:
        """[..., W/4] complex e^(2 pi i t / period) of times [...]: the second half of the pairs of each head turns by
        them."""
        angles = phases(times, self.get_buffer("periods"))
        return torch.polar(torch.ones_like(angles), angles)

    def attention_bias(self, layer: int, query_times: Tensor, times: Tensor) -> Tensor:
        """[B, H, M, L] to add to the scaled products of queries at `query_times` [B, M] and keys at `times` [B, L]."""
        assert self.bias is not None
        since = query_times[:, :, None] - times[:, None, :]
        kind = octave(since.abs()) + OCTAVES * (since < 0)
        return nn.functional.embedding(kind, self.bias[layer]).permute(0, 3, 1, 2)


def rotary_periods(count: int) -> Tensor:
    """[count] int64 seconds from `SHORTEST` to `LONGEST`, in equal ratios.

    Whole seconds, so that the remainder of a time is exact and its angle needs no float64.
    """
    cpu = torch.device("cpu")  # also where a model without weights is made, to be filled
    steps = torch.arange(count, dtype=torch.float64, device=cpu) / max(count - 1, 1)
    return (SHORTEST * (LONGEST / SHORTEST) ** steps).round().long()


def phases(times: Tensor, periods: Tensor) -> Tensor:
    """[..., P] float32 angles of times [...] in each of P periods."""
    return (2 * math.pi) * (times[..., None] % periods).float() / periods


def octave(seconds: Tensor) -> Tensor:
    """floor(log2(seconds + 1)) of int64 seconds >= 0, at most `OCTAVES` - 1, exact: the exponent of the float64."""
    if torch.compiler.is_compiling():  # an exported program cannot look at bits
        powers = 2 ** torch.arange(1, OCTAVES, device=seconds.device)
        return (seconds[..., None] + 1 >= powers).sum(-1)
    return ((seconds + 1).double().view(torch.int64) // 2**52 - 1023).clamp(max=OCTAVES - 1)


def follows(tokens: Tensor, position: Tensor) -> Tensor:
    """[S] bool whether the place before is of the same row of a packed batch."""
    return (position.roll(1) == position + 1) & (tokens.roll(1) != 0)
