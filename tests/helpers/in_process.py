"""Jobs in this process, without Ray: the same code with Ray's part done by hand."""

import contextlib
from types import SimpleNamespace

import pytest

from jobs import export
from tests.helpers.trainer import Quiet


def map_parts(parts, worker, arguments, num_workers, use_gpu):
    made = worker(*arguments)
    return (made(part) for part in parts)


def without_ray(monkeypatch, *modules):
    """Scoring of `modules` in this process."""
    for module in modules:
        monkeypatch.setattr(module, "map_parts", map_parts)
        monkeypatch.setattr(module, "begin", lambda config, meanwhile=(): None)
        monkeypatch.setattr(module, "sort_lists", lambda ranking, dataset: (ranking, []))
        monkeypatch.setattr(module, "for_scoring", lambda config: (False, 1))
        monkeypatch.setattr(module, "Progress", lambda *arguments: contextlib.nullcontext(Quiet()))


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


class LocalRay(SimpleNamespace):
    """Stands in for the module `ray` in `data.prepare`: a task runs when it is asked for."""

    @staticmethod
    def put(value):
        return value

    get = put

    @staticmethod
    def remote(function):
        task = SimpleNamespace(remote=function)
        task.options = lambda **options: task
        return task
