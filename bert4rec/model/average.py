"""The mean of several networks' scores, as one model (`inference.checkpoint_path=[...]`).

A mean of inner products is one inner product: that of the states side by side with the output weights side by side,
divided by the number of networks. So an `Average` ranks wherever a network ranks.

Shapes: V items, K networks, D hidden_units of each.
"""

import hashlib
import os
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bert4rec import storage
from bert4rec.config import Config, DataConfig
from bert4rec.data.dataset import ITEMS
from bert4rec.errors import InputError
from bert4rec.model.network import AVERAGE_OF, CONFIG, BERT4Rec, weights_of
from bert4rec.runs import RUN, newest_run


class Average:
    """Networks of one catalogue that rank together. Their settings may differ."""

    def __init__(self, networks: list[BERT4Rec]) -> None:
        self.networks = networks
        self.num_items, self.catalogue = networks[0].num_items, networks[0].catalogue
        self._weights: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.networks[0].device

    @property
    def reads_times(self) -> bool:
        """Whether a network reads times."""
        return any(network.reads_times for network in self.networks)

    @property
    def usual_gap(self) -> int:
        """The largest of the networks, in seconds: of those that read times, which have the same training data."""
        return max(network.usual_gap for network in self.networks)

    @property
    def unrankable(self) -> Tensor:
        """[V] bool: items that a network cannot score."""
        return torch.stack([network.unrankable for network in self.networks]).any(0)

    def to(self, device: torch.device | str) -> Self:
        """Move the networks."""
        self.networks = [network.to(device) for network in self.networks]
        self._weights = None
        return self

    def items(self, tokens: Tensor) -> Tensor:
        """[N] tokens -> [N, KD] vectors, whose cosine is the mean of the networks' cosines."""
        return torch.cat([F.normalize(network.items(tokens), dim=-1) for network in self.networks], dim=-1)

    def output_weights(self, popularity_discount: float = 0) -> tuple[Tensor, Tensor]:
        """Weights [V, KD] and bias [V], as of `BERT4Rec.output_weights`."""
        if self._weights is None:
            weights = [network.output_weights()[0].detach() for network in self.networks]
            self._weights = torch.cat(weights, dim=1) / len(weights)
        biases = [network.output_weights(popularity_discount)[1] for network in self.networks]
        return self._weights, torch.stack(biases).mean(0)

    def discounted_bias(self, popularity_discount: float) -> Tensor:
        """[V] the mean of the networks' biases, as of `BERT4Rec.discounted_bias`."""
        return torch.stack([network.discounted_bias(popularity_discount) for network in self.networks]).mean(0)

    def check_is_held_out(self, split: str, data: DataConfig, cutoffs: dict[str, int], source: str) -> None:
        """As of `BERT4Rec`, for each network."""
        for network in self.networks:
            network.check_is_held_out(split, data, cutoffs, source)


Model = BERT4Rec | Average


def read_model(directory: str) -> Model:
    """Read a model directory of a network or an average, in evaluation mode.

    Raises
    ------
    InputError
        If a file is missing or damaged, or the average is of a model that has changed since.
    """
    content = storage.read_sealed(storage.join(directory, CONFIG))
    if AVERAGE_OF not in content:
        return BERT4Rec.from_pretrained(directory)
    for path, sha256 in content[AVERAGE_OF].items():
        if not storage.exists(storage.join(path, CONFIG)) or weights_of(path) != sha256:
            raise InputError(f"{directory}: is the average of models of which {path} is missing or has changed since")
    return Average([BERT4Rec.from_pretrained(path) for path in content[AVERAGE_OF]])


def write_average(checkpoints: list[str], directory: str) -> None:
    """Make `directory` the model directory of an average. It names the models and has no weights of its own.

    Raises
    ------
    InputError
        If a model is no network, is named twice, or is of another catalogue than the first.
    """
    paths = [storage.absolute(checkpoint) for checkpoint in checkpoints]
    read = {path: storage.read_sealed(storage.join(path, CONFIG)) for path in paths}
    for path, content in read.items():
        if AVERAGE_OF in content:
            raise InputError(f"{path}: is an average itself; name the models that it is of")
        if paths.count(path) > 1:
            raise InputError(f"{path}: is named twice; expected different models")
        if content["catalogue"] != read[paths[0]]["catalogue"]:
            raise InputError(f"{path}: was trained on another catalogue than {paths[0]}; expected models of the same")
    members = {path: content["weights_sha256"] for path, content in read.items()}
    storage.write_bytes(storage.join(directory, ITEMS), storage.read_bytes(storage.join(paths[0], ITEMS)))
    sha256 = hashlib.sha256("".join(members.values()).encode()).hexdigest()
    content = {AVERAGE_OF: members, "weights_sha256": sha256}
    storage.write_sealed(storage.join(directory, CONFIG), content)


def checkpoint_and_output(config: Config, checkpoint: str | None = None) -> tuple[str, str]:
    """Return the model directory to score with (`checkpoint` if given), and the directory for recommendations.

    Raises
    ------
    InputError
        If the named run, or without a name any run, has not finished training.
    """
    given = (checkpoint,) if checkpoint else config.inference.checkpoint_path
    if given is None:
        root = storage.absolute(config.run.storage_path)
        run = storage.join(root, config.run.name) if config.run.name else newest_run(root)
        if not storage.exists(storage.join(run, RUN)):
            raise InputError(f"{run}: no finished training ({RUN} is missing); run `python -m jobs.train` first")
        given = (run,)
    found = [_best_of(storage.absolute(path)) for path in given]
    checkpoint = found[0] if len(found) == 1 else _average_of(found, config)
    output = config.inference.output_path or storage.join(os.path.dirname(checkpoint.rstrip("/")), "recommendations")
    return checkpoint, storage.absolute(output)


def _best_of(path: str) -> str:
    """The best model of a run; a path that is no finished run is that of a model itself."""
    result = storage.join(path, RUN)
    return storage.inside(path, str(storage.read_json(result)["best_checkpoint"])) if storage.exists(result) else path


def _average_of(checkpoints: list[str], config: Config) -> str:
    """The model directory of their average, which it writes into run.storage_path."""
    name = f"average-{storage.fingerprint(checkpoints)}"
    directory = storage.join(storage.absolute(config.run.storage_path), name, "model")
    write_average(checkpoints, directory)
    print(f"{directory}: the average of {', '.join(checkpoints)}")
    return directory
