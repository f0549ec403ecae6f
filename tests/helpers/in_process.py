"""Jobs in this process, without Ray: the same code with Ray's part done by hand."""

import contextlib

import pyarrow as pa
import pytest

from bert4rec.inference import fit_blend
from jobs import export
from tests.helpers.trainer import Quiet


def map_parts(parts, worker, arguments, num_workers, use_gpu):
    made = worker(*arguments)
    return (made(part) for part in parts)


def without_ray(monkeypatch, *modules):
    """Scoring of `modules` in this process, and fitting of blends."""
    for module in (*modules, fit_blend):
        monkeypatch.setattr(module, "map_parts", map_parts)
        monkeypatch.setattr(module, "begin", lambda config, meanwhile=(): None)
        monkeypatch.setattr(module, "sort_lists", lambda ranking, dataset: (ranking, []), raising=False)
        monkeypatch.setattr(module, "for_scoring", lambda config: (False, 1))
        monkeypatch.setattr(module, "Progress", lambda *arguments: contextlib.nullcontext(Quiet()))
    monkeypatch.setattr(fit_blend, "on_ray", lambda work, *arguments: work(*arguments))


def exported(config, checkpoint, inputs):
    """What the programs that `jobs.export` would write give for their inputs, by format."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "checkpoint_and_output", lambda config: (checkpoint, ""))
        patch.setattr(export, "check_onnx", lambda: None)
        patch.setattr(export.storage, "check_writable", lambda path: None)
        patch.setattr(export, "export_program", lambda function: function.eval())
        patch.setattr(export, "write_catalogue", lambda items, directory: "")
        for form in ("torch", "onnx"):
            patch.setattr(
                export, f"write_{form}", lambda program, directory, form=form: found.update({form: program(*inputs)})
            )
        with contextlib.redirect_stdout(None):
            export.export_model(config)
    return {
        form: [out.tolist() for out in (outs if isinstance(outs, tuple) else [outs])] for form, outs in found.items()
    }


class LocalDataset:
    """Stands in for a dataset of Ray Data: a list of blocks, in this process."""

    def __init__(self, blocks):
        self.blocks = blocks

    def map_batches(self, function, batch_size, batch_format, fn_kwargs=None):
        assert batch_format == "pyarrow"
        blocks = self.blocks if batch_size is None else [pa.concat_tables(self.blocks)]
        assert batch_size is None or len(blocks[0]) <= batch_size
        mapped = [function(block, **fn_kwargs or {}) for block in blocks]
        return LocalDataset([block for block in mapped if len(block)])

    def repartition(self, num_blocks, keys):
        """Shards come in any order, here the last block's first; a partition has several keys, another has none."""
        rows = pa.concat_tables(self.blocks[::-1])
        (key,) = keys
        place = rows[key].to_numpy() % max(1, num_blocks - 1)
        return LocalDataset([rows.filter(pa.array(place == number)) for number in range(num_blocks)])

    def materialize(self):
        return self

    def num_blocks(self):
        return len(self.blocks)

    def iter_batches(self, batch_size, batch_format):
        assert (batch_size, batch_format) == (None, "pyarrow")
        return iter(self.blocks[::-1])  # they come in no order


class LocalRayData:
    """Stands in for the module `data.ray_data`."""

    settings = contextlib.nullcontext

    @staticmethod
    def dataset_of(calls):
        return LocalDataset([table for call in calls for table in call()])

    @staticmethod
    def repeated(work, report):
        return work()

    @staticmethod
    def run_shuffle(dataset, stage, num_tasks):
        return dataset
