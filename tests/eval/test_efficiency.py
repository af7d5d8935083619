"""Costs against worked examples, published counts and files on disk."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import faceless
from eval import efficiency
from faceless import onnx_files
from faceless.recognizer import InputSpec, Recognizer


def test_a_small_perceptron_has_22_parameters_and_88_bytes():
    """2-4-2: (2 + 1) x 4 + (4 + 1) x 2."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    assert efficiency.parameters(net) == 22
    assert efficiency.megabytes(net) == 88e-6
    assert efficiency.megabytes(net, "fp16") == 44e-6
    assert efficiency.macs(net, torch.zeros(1, 2)) == 2 * 4 + 4 * 2


def test_three_filters_on_five_by_five_pixels():
    """30 parameters; 486 FLOPs without biases, 540 when a bias counts as a multiply-accumulate."""
    conv = nn.Conv2d(1, 3, 3)
    assert efficiency.parameters(conv) == 30
    counted = efficiency.operations(conv, torch.zeros(1, 1, 5, 5))
    assert counted.published["2 MACs (EdgeFace)"] == 486
    assert counted.published["2 (MACs + biases) (textbooks)"] == 540


def test_a_dense_layer_on_a_face():
    assert efficiency.macs(nn.Linear(112 * 112 * 3, 500), torch.zeros(1, 112 * 112 * 3)) == 18_816_000


def test_frozen_shared_and_saved_numbers():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    net[1].weight.requires_grad_(False)
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert efficiency.parameters(net) == 16 + 4 + 8 + 4
    assert efficiency.trainable(net) == 16 + 4 + 4 + 4
    assert efficiency.buffers(net) == 4 + 4 + 1  # mean, variance, number of batches
    assert efficiency.megabytes(net) == ((32 + 8) * 4 + 8) / 1e6
    with pytest.raises(ValueError, match="use one of fp32, fp16, int8"):
        efficiency.megabytes(net, "int4")


def test_megabytes_are_those_of_the_saved_file(tmp_path):
    student = faceless.create("mobilefacenet", embedding_dim=128, width=0.5)
    faceless.save(student, tmp_path / "student", record={})
    file = tmp_path / "student" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert efficiency.megabytes(student) == (file.stat().st_size - header) / 1e6


def test_published_counts_of_mobilefacenet():
    """221,161,984 multiply-accumulates at 112 x 112 with 512 dimensions."""
    net = faceless.create("mobilefacenet", embedding_dim=512)
    assert efficiency.macs(net, torch.zeros(1, 3, 112, 112)) == 221_161_984


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("mobilefacenet", {"embedding_dim": 512}, 451.50),
        ("iresnet18", {}, 5233.33),
        ("pocketnet-s", {"embedding_dim": 128}, 587.11),
        ("pocketnet-m", {"embedding_dim": 128}, 1099.02),
    ],
)
def test_published_flops_of_pocketnets_convention(name, options, millions):
    """What fdbtrs/PocketNet and its relatives print: twice the MACs, 2 a normalized value, 1 a PReLU or pooled one."""
    net = faceless.create(name, **options).backbone
    counted = efficiency.operations(net, torch.zeros(1, 3, 112, 112)).published
    (key,) = [key for key in counted if "PocketNet" in key]
    assert counted[key] / 1e6 == pytest.approx(millions, abs=0.005)


def test_counting_leaves_nothing_behind():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.MaxPool2d(3, 3)).train()
    found = efficiency.operations(net, torch.zeros(2, 3, 8, 8))
    assert (found.biases, found.normalized, found.rectified, found.pooled) == (2 * 4 * 36,) * 4
    assert net.training and not any(layer._forward_hooks for layer in net.modules())


def test_the_command_names_its_conventions(tmp_path, capsys):
    for seed in (0, 1):
        student = faceless.create("slimresnet", embedding_dim=16, input_size=32, seed=seed)
        faceless.save(student, tmp_path / f"m{seed}", record={})
    models = [str(tmp_path / "m0"), str(tmp_path / "m1")]
    small = ["--batches", "1", "2", "--runs", "3", "--warmup", "1", "--json", str(tmp_path / "costs.json")]
    efficiency.main(["--model", *models, *small])
    printed = capsys.readouterr().out
    assert efficiency.CONVENTION in printed and "PocketNet" in printed
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert list(costs) == models
    assert f"{costs[models[0]]['macs']:,}" in printed and f"{costs[models[0]]['megabytes']['int8']:.3f}" in printed
    assert set(costs[models[1]]["latency_ms"]) == {"batch1", "batch2"}
    with pytest.raises(SystemExit):
        efficiency.main(["--model", *models, "--batches", "0"])
    assert "error: --batches" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        efficiency.main(["--model", *models, "--rounds", "5"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and "rounds" in line and "did you mean runs" in line


def test_quantiles_are_measured_times():
    assert efficiency.quantiles(range(1, 101)) == {"median": 50, "p5": 5, "p95": 95}
    assert efficiency.quantiles([7.0]) == {"median": 7.0, "p5": 7.0, "p95": 7.0}


class Slow(nn.Module):
    """Takes about a millisecond for each face, and counts its calls."""

    embedding_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        import time

        self.calls.append((len(images), self.training, torch.is_inference_mode_enabled()))
        time.sleep(1e-3 * len(images))
        return images.mean((2, 3))


def test_latency_warms_up_and_runs_in_inference_mode():
    net = Recognizer(Slow(), InputSpec(8, 8)).train()
    times = efficiency.latency(net, batch=4, runs=7, warmup=3)
    assert net.backbone.calls == [(4, False, True)] * 10
    assert 4 <= times["p5"] <= times["median"] <= times["p95"] < 1000
    assert net.training


def test_measure_reports_everything_and_restores_the_threads():
    before = torch.get_num_threads()
    student = faceless.create("slimresnet", embedding_dim=32, input_size=64)
    costs = efficiency.measure(student, batches=(1, 4), runs=5, warmup=1, threads=1)
    assert torch.get_num_threads() == before
    assert costs["parameters"] == sum(p.numel() for p in student.parameters())
    assert costs["flops"] == 2 * costs["macs"] > 0
    assert costs["megabytes"]["fp32"] > 3.9 * costs["megabytes"]["int8"]
    assert set(costs["latency_ms"]) == {"batch1", "batch4"}
    assert (costs["threads"], costs["device"], costs["input"]) == (1, "cpu", [64, 64])
    assert "2 FLOPs" in costs["convention"]


def test_onnx_is_timed_beside(tmp_path):
    pytest.importorskip("onnxruntime")
    student = faceless.create("slimresnet", embedding_dim=16, input_size=32)
    costs = efficiency.measure(student, batches=(1, 3), runs=5, warmup=1, threads=1, onnx=True)
    assert set(costs["onnx_latency_ms"]) == {"batch1", "batch3"}
    for times in costs["onnx_latency_ms"].values():
        assert 0 < times["p5"] <= times["median"] <= times["p95"]
    printed = efficiency.table({"student": costs})
    assert "ms by onnxruntime, batch of 3" in printed
    path = faceless.export_onnx(student, tmp_path / "x.onnx")
    computed = onnx_files.compute(onnx_files.read(path), path)
    assert efficiency.onnx_latency(computed, runs=3, warmup=1)["median"] > 0
    assert "onnx_latency_ms" not in efficiency.measure(student, batches=(1,), runs=1, warmup=0)


def test_peak_memory_holds_at_least_the_weights():
    student = faceless.create("iresnet18")
    peak = efficiency.peak_megabytes(student, batch=8)
    # 96 MB of weights; a batch of 8 at 112 pixels has a first feature map of 64 x 112 x 112 floats a face, 26 MB.
    assert 96 + 26 < peak < 1500
