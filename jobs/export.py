"""Exports a trained model as stand-alone programs: `python -m jobs.export [--config FILE] [group.key=value ...]`."""

import os
from typing import Literal, assert_never

import torch

from bert4rec import lease, storage
from bert4rec.cli import run_job
from bert4rec.config import Config
from bert4rec.data.dataset import PreparedDataset
from bert4rec.errors import InputError
from bert4rec.inference.export import (
    ScoringFunction,
    check_onnx,
    export_program,
    write_catalogue,
    write_onnx,
    write_torch,
)
from bert4rec.inference.ranking import NO_RULES, Ranking
from bert4rec.inference.recommender import load
from bert4rec.inference.vectors import ITEM_VECTORS, USER_VECTORS, export_vectors
from bert4rec.model.average import checkpoint_and_output
from bert4rec.model.network import BERT4Rec


def export_model(config: Config) -> str:
    """Write the config's model in each of `export.formats`. Return the directory."""
    if "onnx" in config.export.formats:
        check_onnx()
    checkpoint, _ = checkpoint_and_output(config)
    run = os.path.dirname(checkpoint.rstrip("/"))
    output_path = storage.absolute(config.export.output_path or storage.join(run, "export"))
    storage.check_writable(output_path)
    print(f"model: {checkpoint}")
    programs = [form for form in config.export.formats if form != "vectors"]
    with lease.held(output_path):
        if programs:
            _export_programs(config, checkpoint, programs, output_path)
        if "vectors" in config.export.formats:
            for note in export_vectors(config, PreparedDataset(config.prepared_path), checkpoint, output_path):
                print(f"note: {note}")
            print(f"vectors: {output_path}/{ITEM_VECTORS}, {output_path}/{USER_VECTORS}")
    return output_path


def _export_programs(config: Config, checkpoint: str, forms: list[Literal["torch", "onnx"]], output_path: str) -> None:
    """Write the scoring function in each of `forms`."""
    recommender = load(checkpoint)
    model = recommender.model
    if not isinstance(model, BERT4Rec):
        raise InputError(
            f"{checkpoint}: is an average of models, and a program has one network; export.formats=[vectors] exports it"
        )
    topk, num_items = config.export.topk, model.num_items
    if topk is not None and topk > num_items:
        raise InputError(f"export.topk={topk} is larger than the catalogue, which has {num_items} items")
    ranking = Ranking.of(config.inference)
    later = ranking.identity().keys() - NO_RULES.identity().keys()
    items = recommender.items if later else None
    program = export_program(ScoringFunction(model, topk, ranking, items))
    times = ", times [users, length] int64 Unix seconds, at [users] int64 Unix seconds"
    inputs = "history [users, length] int64" + times * model.reads_times
    print(f"{inputs} -> " + _outputs(topk, num_items))
    for form in forms:
        print(f"{form}: {_write(form, program, output_path)}")
    print(f"tokens of items: {write_catalogue(recommender.items, output_path)}")


def _write(form: Literal["torch", "onnx"], program: torch.export.ExportedProgram, directory: str) -> str:
    match form:
        case "torch":
            return write_torch(program, directory)
        case "onnx":
            return write_onnx(program, directory)
        case _:
            assert_never(form)


def _outputs(topk: int | None, num_items: int) -> str:
    if topk is None:
        return f"scores [users, {num_items}] float32, the first of token 1"
    return f"scores [users, {topk}] float32, items [users, {topk}] int64 tokens"


if __name__ == "__main__":
    run_job("Export the scoring function with torch.export and as ONNX.", export_model)
