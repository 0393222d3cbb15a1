"""Towers and connectors -> a folder of ONNX graphs, checked against PyTorch.

    fp32  as they are
    fp16  traced in float16; what torch computes in float32 meanwhile, ONNX Runtime does as well
    int8  the fp32 graphs, with the weights of matrix products in 8 bits and a scale for each output
          channel; activations are quantised on their way. Convolutions stay as they are

Tensors lie beside the graph, since a graph file ends at 2 GB.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor
from torch.onnx import OnnxExporterError

from vla2_models.checkpoint import Checkpoint
from vla2_models.errors import one_line
from vla2_models.files import UNFINISHED
from vla2_models.loading import load_front
from vla2_models.videollama2 import VideoLLaMA2
from vla2cli.console import Say
from vla2cli.errors import FrontendError, why
from vla2cli.frontend.graphs import Graph, frame_bytes, list_graphs
from vla2cli.frontend.manifest import (
    FORMAT,
    Difference,
    Manifest,
    Origin,
    hash_new_files,
    versions,
)
from vla2cli.frontend.origin import origin_of
from vla2cli.frontend.session import Session

# how far a graph may be from PyTorch in float32. fp32: any value, as a share of it, or of the root
# mean square of all where that is more, above 1. The others lose what they lose, which is told;
# beyond this they are of no use
WORST_FP32 = 1e-4
WORST_RELATIVE = {"fp16": 0.05, "int8": 0.5}


def export_checkpoint(checkpoint: Checkpoint, folder: Path, precision: str, say: Say) -> Manifest:
    """Read towers and connectors of a checkpoint and export them; see `export_frontend`.

    Raises:
        CheckpointError: as `load_front`.
        FrontendError: as `export_frontend`.
    """
    origin = origin_of(checkpoint, precision, say)
    say(f"exporting the front-end of {origin.id} to ONNX in {precision}, once …")
    return export_frontend(load_front(checkpoint), folder, origin, say)


def export_frontend(
    model: VideoLLaMA2,
    folder: Path,
    origin: Origin,
    say: Say,
) -> Manifest:
    """Write the graphs of a model and their manifest; where that fails, nothing is left.

    Args:
        model: in float32, on the CPU; its language model may be without weights.
        folder: what it holds is replaced.
        origin: what the model is, and the precision wanted.
        say: told what is waited for, and how far each graph is from PyTorch.

    Raises:
        FrontendError: a graph does not compute what PyTorch does, or the folder cannot be written.
    """
    differences: dict[str, Difference] = {}
    itemsize = 2 if origin.precision == "fp16" else 4
    ears = model.config.audio
    with write_aside(folder) as aside:
        for graph in list_graphs(model):
            say(f"exporting {graph.name}.onnx …")
            differences[graph.name] = export_graph(graph, aside / f"{graph.name}.onnx", origin)
            say(describe_difference(graph.name, differences[graph.name]))
        manifest = Manifest(
            format=FORMAT,
            origin=origin,
            versions=versions(),
            frame_bytes=frame_bytes(model.config, itemsize),
            patch_rows=None if ears is None else ears.design.patch_size,
            graphs=differences,
            files=hash_new_files(aside),
        )
        manifest.write(aside)
    return manifest


def export_graph(graph: Graph, path: Path, origin: Origin) -> Difference:
    """Write one graph and its tensors, and check it at the sizes it was not traced with.

    Raises:
        FrontendError: it does not compute what PyTorch does.
    """
    if origin.precision == "int8":
        _trace_and_quantise(graph, path, origin)
    else:
        _trace(graph, path, origin)
    return _check(graph, path, origin.precision)


def describe_difference(graph: str, difference: Difference) -> str:
    """Say how far a graph is from PyTorch."""
    return (
        f"{graph}: at most {difference.max_abs:.1e} from PyTorch in float32, "
        f"relative {difference.relative:.1e}"
    )


@contextmanager
def write_aside(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; where all goes well it takes the place of `folder`.

    Raises:
        FrontendError: it cannot be written.
    """
    folder = folder.absolute()
    # no folder above is made before there is something to put there
    above = next(path for path in folder.parents if path.exists())
    try:
        prefix = f"{UNFINISHED}{folder.name}-"
        with tempfile.TemporaryDirectory(dir=above, prefix=prefix) as aside:
            whole = Path(aside, folder.name)
            whole.mkdir()  # as the umask has it; the one around it is ours alone
            yield whole
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.is_dir():
                shutil.rmtree(folder)
            whole.rename(folder)
    except OSError as error:
        raise FrontendError(f"'{folder}' cannot be written: {why(error)}") from error


def _trace_and_quantise(graph: Graph, path: Path, origin: Origin) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, _quietly():
        whole = Path(scratch, path.name)
        _trace(graph, whole, origin)
        quantize_dynamic(
            whole,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )


def _trace(graph: Graph, path: Path, origin: Origin) -> None:
    is_half = origin.precision == "fp16"
    dtype = torch.float16 if is_half and not graph.always_float32 else torch.float32
    module = graph.half() if is_half else graph.module
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (torch.zeros(graph.example, dtype=dtype),),
                input_names=[graph.input],
                output_names=list(graph.outputs),
                dynamic_shapes=(graph.axes,),
                dynamo=True,
                verbose=False,
            )
    except OnnxExporterError as error:
        raise FrontendError(f"the {graph.name} cannot be exported: {one_line(error)}") from error
    assert program is not None, "with dynamo, the exporter returns what it has made"
    _describe(program.model, graph.name, origin)
    program.save(path, external_data=True)


def _describe(model: Any, name: str, origin: Origin) -> None:
    # where in which source file each node comes from is of no use elsewhere, and says where we are
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    about = {"graph": name, **asdict(origin), **versions()}
    model.metadata_props.update({f"vla2.{key}": value for key, value in about.items() if value})


def _check(graph: Graph, path: Path, precision: str) -> Difference:
    session = Session(path, torch.device("cpu"))
    differences = []
    for shape in graph.checks:
        x = graph.sample(shape)
        with torch.inference_mode():
            expected = graph.plain(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, wanted in zip(session(x), expected, strict=True):
            differences.append(_compare(found, wanted, graph.name, precision))
    return Difference(
        max_abs=max(difference.max_abs for difference in differences),
        relative=max(difference.relative for difference in differences),
    )


def _compare(found: Tensor, wanted: Tensor, name: str, precision: str) -> Difference:
    if found.shape != wanted.shape:
        raise FrontendError(
            f"the exported {name} gives {list(found.shape)} where PyTorch gives "
            f"{list(wanted.shape)}; give --frontend torch"
        )
    error = (found.float() - wanted).abs()
    difference = Difference(error.max().item(), (error.norm() / wanted.norm()).item())
    if precision == "fp32":
        # a small value among large ones is a difference of large ones, and rounded as they are
        size = wanted.abs().clamp(min=max(1.0, wanted.square().mean().sqrt().item()))
        is_close = bool((error <= WORST_FP32 * size).all())
    else:
        is_close = difference.relative <= WORST_RELATIVE[precision]
    if not is_close:  # or not a number at all
        raise FrontendError(
            f"the exported graph is wrong in {precision}, {describe_difference(name, difference)}; "
            "give another --precision, or --frontend torch"
        )
    return difference


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's remarks on its own code from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
