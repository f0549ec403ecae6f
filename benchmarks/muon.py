"""A step of Muon over the matrices of the transformer, ours and torch's, in turn: `python -m benchmarks.muon`."""

import statistics
import time

import torch

from benchmarks.common import options, publish
from bert4rec.config import ModelConfig, TrainingConfig
from bert4rec.model.network import BERT4Rec
from bert4rec.training.loop import make_optimizers
from bert4rec.training.muon import BFloat16Muon, Float32Muon, muon_for


def main() -> None:
    parser = options("Milliseconds of an optimiser step of Muon, ours and torch's.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=9, help="turns of each")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for hidden in args.hidden:
        torch.manual_seed(args.seed)
        model = BERT4Rec(ModelConfig(hidden_units=hidden), 10)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        muon = make_optimizers(model, TrainingConfig(optimizer="muon"))[1].param_groups[0]
        arguments = {name: muon[name] for name in ("params", "lr", "weight_decay", "adjust_lr_fn")}
        contenders = {
            "float32": Float32Muon(**arguments),
            "bfloat16": BFloat16Muon(**arguments),
            "torch, bfloat16": torch.optim.Muon(**arguments),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(args.repeats + 1):
            for name, optimizer in contenders.items():
                began = time.perf_counter()
                optimizer.step()  # type: ignore[no-untyped-call]
                seconds[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up
        rows += [
            {
                "hidden": str(hidden),
                "implementation": name,
                "ms a step": f"{1e3 * medians[name]:.1f}",
                "spread": f"{1e3 * min(seconds[name][1:]):.1f}–{1e3 * max(seconds[name][1:]):.1f}",
                "float32 is": f"{medians[name] / medians['float32']:.1f}×" if name != "float32" else "",
            }
            for name in contenders
        ]
    notes = [
        f"2 layers, {args.threads} threads; seed {args.seed}; medians of {args.repeats} turns; bfloat16 in hardware: "
        f"{muon_for(torch.device('cpu'), 1024) is torch.optim.Muon}.",
    ]
    publish("muon", notes, rows, args.record)


if __name__ == "__main__":
    main()
