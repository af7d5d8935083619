"""What losses and prompts draw follows the seed of the run, unless they name one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.chain import links
from distill.losses.contrastive import QUD
from distill.settings import Run
from faceless.settings import parse
from tests.distill.test_train import recipe


def loss(path: str, **arguments: Any) -> dict[str, Any]:
    return {"loss": {"class_path": f"distill.losses.{path}", "init_args": arguments}}


def test_losses_and_prompts_follow_the_seed_of_the_run_unless_they_name_one(tmp_path: Path) -> None:
    queue = loss("contrastive.QUD", embedding_dim=4, queue_size=8)
    losses = {
        "head": loss("margin.ArcFace", embedding_dim=4, classes=6),
        "named": loss("margin.ArcFace", embedding_dim=4, classes=6, seed=0),
        "plain": loss("embedding.CosineEmbedding"),
        "peer": loss("mutual.EachPeer", **queue),
        "adaptive": loss("adaptive_parameters.AdaptiveQUD", embedding_dim=4, queue_size=8, update="simQ"),
    }
    path = recipe(tmp_path, tmp_path, losses=losses, prompts={"tokens": 5}, chain=[{}, {}], seed=3)
    found = links(parse(Run, ["--config", str(path)]))
    # What is written into the folder of the run, and compared when it goes on, is the seed that it had.
    written = [link.asdict()["losses"] for link in found]
    assert [part["head"]["loss"]["init_args"]["seed"] for part in written] == [1003, 3]
    for seed, run in zip((1003, 3), (link.build() for link in found)):
        terms: dict[str, Any] = {name: term.loss for name, term in run.losses.items()}
        assert (terms["head"].seed, terms["named"].seed, run.prompts.seed) == (seed, 0, seed)
        rows = QUD(embedding_dim=4, queue_size=8, seed=seed).negatives.rows
        assert torch.equal(terms["peer"].copies[0].negatives.rows, rows)
        assert torch.equal(terms["adaptive"].negatives.rows, rows) and terms["adaptive"].update == "simQ"
    assert torch.equal(QUD(embedding_dim=4).negatives.rows, QUD(embedding_dim=4, seed=0).negatives.rows)
