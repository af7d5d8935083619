"""What a recognizer costs: parameters, operations, bytes, milliseconds.

python eval/efficiency.py --model runs/quickstart/student dlib-resnet29 --memory true

Conventions, since every paper has its own: a multiply-accumulate (MAC) is one multiplication with its addition, an
operation (FLOP) is half of it; convolutions and matrix products are counted, while biases, normalization, activations,
pooling and resizing are not. `Operations` has what other conventions count besides. A megabyte is 10^6 bytes.
"""

from __future__ import annotations

import copy
import json as json_format
import math
import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import faceless
from faceless import onnx_files, settings
from faceless.devices import chosen_device
from faceless.errors import InputError, command
from faceless.files import atomic_write
from faceless.recognizer import Recognizer

CONVENTION = "1 MAC = 1 multiplication + 1 addition = 2 FLOPs; convolutions and matrix products without their biases"
#: Bytes of one weight. int8 is without scales and zero points.
PRECISIONS = {"fp32": 4, "fp16": 2, "int8": 1}


def parameters(module: nn.Module) -> int:
    """Learned numbers; one that is used in several places counts once."""
    return sum(p.numel() for p in module.parameters())


def trainable(module: nn.Module) -> int:
    """Learned numbers that are not frozen."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _saved_buffers(module: nn.Module) -> list[Tensor]:
    learned = {id(p) for p in module.parameters()}
    unique = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    return [tensor for key, tensor in unique.items() if key not in learned]


def buffers(module: nn.Module) -> int:
    """Numbers that are saved but not learned, such as the statistics of batch normalization."""
    return sum(b.numel() for b in _saved_buffers(module))


def megabytes(module: nn.Module, precision: str = "fp32") -> float:
    """Size of parameters and saved buffers in 10^6 bytes; whole numbers among the buffers keep their type."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    size = PRECISIONS[precision]
    saved = _saved_buffers(module)
    return (
        parameters(module) * size
        + sum(b.numel() * (size if b.is_floating_point() else b.element_size()) for b in saved)
    ) / 1e6


@dataclass(frozen=True)
class Operations:
    """What one forward pass computes.

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products, half of what ``FlopCounterMode`` counts.
        biases: values to which a convolution or dense layer adds a bias.
        normalized: values that pass through batch normalization.
        rectified: values that pass through a PReLU.
        pooled: values that the windows of max and average pooling hold, those in several windows several times.
    """

    macs: int
    biases: int
    normalized: int
    rectified: int
    pooled: int

    @property
    def published(self) -> dict[str, int]:
        """The number that people who count as these papers do would print."""
        return {
            "MACs (InsightFace, MobileFaceNet, GhostFaceNet)": self.macs,
            "2 MACs (EdgeFace)": 2 * self.macs,
            "2 MACs + 2 a normalized value + 1 a PReLU or pooled value (PocketNet, MixFaceNet)": 2 * self.macs
            + 2 * self.normalized
            + self.rectified
            + self.pooled,
            "2 (MACs + biases) (textbooks)": 2 * (self.macs + self.biases),
        }


def operations(module: nn.Module, *inputs: Tensor) -> Operations:
    """Counts of one forward pass in eval mode.

    >>> found = operations(nn.Conv2d(1, 3, 3), torch.zeros(1, 1, 5, 5))  # 3 filters x 9 places x 9 weights
    >>> found.macs, found.biases
    (243, 27)
    """
    counts = {"biases": 0, "normalized": 0, "rectified": 0, "pooled": 0}

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            counts["normalized"] += output.numel()
        elif isinstance(layer, nn.PReLU):
            counts["rectified"] += output.numel()
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            sides = layer.kernel_size
            window = math.prod(sides) if isinstance(sides, tuple) else sides**2
            counts["pooled"] += window * output.numel()
        elif getattr(layer, "bias", None) is not None:
            counts["biases"] += output.numel()

    counted = (
        *(nn.modules.batchnorm._BatchNorm, nn.PReLU, nn.MaxPool2d, nn.AvgPool2d),
        *(nn.modules.conv._ConvNd, nn.Linear),
    )
    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, counted)]
    training = module.training
    module.eval()
    try:
        # no_grad, not inference_mode: the counter only sees operations that are dispatched one by one.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*inputs)
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()
    return Operations(counter.get_total_flops() // 2, **counts)


def macs(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of one forward pass; see `Operations`."""
    return operations(module, *inputs).macs


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def quantiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median and the 5th and 95th percentile, each a time that was really measured (nearest rank)."""
    ordered = sorted(milliseconds)
    rank = {"median": 0.5, "p5": 0.05, "p95": 0.95}
    return {name: ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in rank.items()}


def latency(recognizer: Recognizer, batch: int = 1, runs: int = 50, warmup: int = 10) -> dict[str, float]:
    """Milliseconds of a forward pass, normalization of pixels included: median, p5, p95 of ``runs``.

    float32, eval mode, inference mode, on the recognizer's device, which is waited for when it is a GPU.
    """
    device, spec = recognizer.scale.device, recognizer.spec
    images = torch.full((batch, 3, spec.height, spec.width), 128, dtype=torch.uint8, device=device)
    training = recognizer.training
    recognizer.eval()
    times = []
    try:
        with torch.inference_mode():
            for run in range(warmup + runs):
                _wait(device)
                start = time.perf_counter()
                recognizer(images)
                _wait(device)
                if run >= warmup:
                    times.append(1e3 * (time.perf_counter() - start))
    finally:
        recognizer.train(training)
    return quantiles(times)


def onnx_latency(recognizer: Recognizer, batch: int = 1, runs: int = 50, warmup: int = 10) -> dict[str, float]:
    """`latency` of the recognizer's ONNX export, which onnxruntime computes on the CPU.

    Raises:
        InputError: the extra ``onnx`` is not installed, or the recognizer cannot be exported.
    """
    if not isinstance(recognizer.backbone, onnx_files.OnnxRuntime):
        with tempfile.TemporaryDirectory() as folder:
            path = faceless.export_onnx(recognizer, Path(folder) / "model.onnx")
            recognizer = onnx_files.compute(onnx_files.read(path), path)
    return latency(recognizer, batch, runs, warmup)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _highest_resident() -> int:
    """Most memory that this process has held so far, in bytes."""
    # On Linux ru_maxrss also knows the parent process from before exec, which is larger than all that is measured here.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def _measure_peak(pipe: Connection, pickled: bytes, batch: int) -> None:
    before = _highest_resident()
    recognizer: Recognizer = pickle.loads(pickled)  # of our own making, from the parent process
    with torch.inference_mode():
        recognizer(torch.zeros(batch, 3, recognizer.spec.height, recognizer.spec.width, dtype=torch.uint8))
    pipe.send(_highest_resident() - before)


def peak_megabytes(recognizer: Recognizer, batch: int = 1) -> float:
    """Memory that weights and one forward pass need at most, in 10^6 bytes.

    On a GPU what PyTorch allocates there. On a CPU the growth of a fresh process, without the imports (which takes a
    few seconds).
    """
    recognizer = copy.deepcopy(recognizer).eval()
    device, spec = recognizer.scale.device, recognizer.spec
    if device.type == "cuda":
        before = sum(t.numel() * t.element_size() for t in [*recognizer.parameters(), *recognizer.buffers()])
        images = torch.zeros(batch, 3, spec.height, spec.width, dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            recognizer(images)
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - resting + before) / 1e6
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sending, pickle.dumps(recognizer), batch))
    process.start()
    sending.close()
    try:
        return int(receiving.recv()) / 1e6
    except EOFError as error:
        raise InputError(f"measuring the memory of a batch of {batch} failed; there may not be enough of it") from error
    finally:
        process.join()


def measure(
    recognizer: Recognizer,
    batches: Sequence[int] = (1, 32),
    runs: int = 50,
    warmup: int = 10,
    threads: int | None = None,
    memory: bool = False,
    onnx: bool = False,
) -> dict[str, Any]:
    """All costs of a recognizer, ready for JSON.

    Args:
        batches: batch sizes of the latency; larger than one is run a fifth as often.
        runs, warmup: of the latency at batch size 1.
        threads: of the CPU; as many as PyTorch uses when None.
        memory: also measure the peak memory, see `peak_megabytes`.
        onnx: also measure `onnx_latency`.
    """
    spec, device = recognizer.spec, recognizer.scale.device
    face = torch.zeros(1, 3, spec.height, spec.width, dtype=torch.uint8, device=device)
    counted = operations(recognizer, face)
    how_often = {b: (runs, warmup) if b == 1 else (-(-runs // 5), -(-warmup // 5)) for b in batches}
    with _threads(threads) as count:
        times = {f"batch{batch}": latency(recognizer, batch, *how_often[batch]) for batch in batches}
        if onnx:
            exported = {f"batch{batch}": onnx_latency(recognizer, batch, *how_often[batch]) for batch in batches}
    result: dict[str, Any] = {
        "parameters": parameters(recognizer),
        "trainable": trainable(recognizer),
        "buffers": buffers(recognizer),
        "macs": counted.macs,
        "flops": 2 * counted.macs,
        "convention": CONVENTION,
        "flops_by_convention": counted.published,
        "input": [spec.height, spec.width],
        "megabytes": {precision: megabytes(recognizer, precision) for precision in PRECISIONS},
        "latency_ms": times,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": count,
    }
    if onnx:
        result["onnx_latency_ms"] = exported
    if memory:
        result["peak_megabytes"] = {f"batch{batch}": peak_megabytes(recognizer, batch) for batch in batches}
    return result


def table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """The costs of several models as plain text, with every convention named."""
    all_costs, first = list(costs.values()), next(iter(costs.values()))
    rows = [("", list(costs)), ("input, pixels", [" x ".join(map(str, cost["input"])) for cost in all_costs])]
    for name in ("parameters", "trainable", "buffers"):
        rows.append((name, [f"{cost[name]:,}" for cost in all_costs]))
    for name in first["flops_by_convention"]:
        rows.append((name, [f"{cost['flops_by_convention'][name]:,}" for cost in all_costs]))
    for name in first["megabytes"]:
        rows.append((f"MB in {name}", [f"{cost['megabytes'][name]:.3f}" for cost in all_costs]))
    for key, what in (("latency_ms", "ms"), ("onnx_latency_ms", "ms by onnxruntime")):
        for name in first.get(key, ()):
            times = [cost[key][name] for cost in all_costs]
            cells = [f"{time['median']:.2f} ({time['p5']:.2f} - {time['p95']:.2f})" for time in times]
            rows.append((f"{what}, {name.replace('batch', 'batch of ')}", cells))
    for name in first.get("peak_megabytes", ()):
        peaks = [f"{cost['peak_megabytes'][name]:.1f}" for cost in all_costs]
        rows.append((f"peak MB, {name.replace('batch', 'batch of ')}", peaks))
    widths = [max(len(name) for name, _ in rows)]
    widths += [max(len(cells[i]) for _, cells in rows) for i in range(len(costs))]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]).rstrip()
        for name, cells in rows
    ]
    return "\n".join(
        [
            lines[0],
            "-" * max(map(len, lines)),
            *lines[1:],
            "",
            f"MAC: {CONVENTION}.",
            f"Times: median (5th to 95th percentile) in float32 on {first['device']}; CPU threads: {first['threads']}.",
        ]
    )


def parser() -> ArgumentParser:
    options = ArgumentParser(prog="eval/efficiency.py", description="What recognizers cost.", exit_on_error=False)
    options.add_argument(
        "--model", nargs="+", required=True, metavar="SOURCE", help="names, folders or files that faceless.load reads"
    )
    options.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="batch sizes of the latency")
    options.add_argument("--runs", type=int, default=50, help="timed runs of one face, a fifth of that for batches")
    options.add_argument("--warmup", type=int, default=10, help="runs before them")
    options.add_argument("--threads", type=int | None, help="of the CPU; as many as PyTorch uses by default")
    options.add_argument("--memory", type=bool, default=False, help="also measure the peak memory")
    options.add_argument(
        "--onnx", type=bool, default=False, help="also time the ONNX export, which onnxruntime computes on the CPU"
    )
    options.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda")
    options.add_argument("--json", type=str | None, help="write the figures here, by model")
    return options


@command
def main(arguments: Sequence[str] | None = None) -> None:
    options = settings.options(parser(), arguments)
    if min(options.batches) < 1 or options.runs < 1 or options.warmup < 0 or (options.threads or 1) < 1:
        raise InputError("--batches, --runs and --threads are 1 or more, --warmup 0 or more")
    device = chosen_device(options.device, "--device")
    costs = {
        source: measure(
            faceless.load(source).to(device),
            options.batches,
            options.runs,
            options.warmup,
            options.threads,
            options.memory,
            options.onnx,
        )
        for source in options.model
    }
    print(table(costs))
    if options.json:
        atomic_write(options.json, json_format.dumps(costs, indent=2) + "\n")


if __name__ == "__main__":
    main()
