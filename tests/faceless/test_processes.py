"""How many processes a launcher asked for; that they really run is tested with the training command."""

from __future__ import annotations

import pytest

from faceless.errors import InputError
from faceless.processes import spread, wanted


@pytest.mark.parametrize(
    "command, count",
    [
        (["accelerate", "launch", "--cpu", "--num_processes", "4", "x.py"], 4),
        (["python", "-m", "accelerate.commands.launch", "--num-processes=2", "x.py"], 2),
        (["accelerate", "launch", "--cpu", "x.py"], None),
        (["accelerate", "launch", "--num_processes", "two", "x.py"], None),
        (["accelerate", "launch", "--num_processes"], None),
    ],
)
def test_the_number_is_read_from_the_command_line(command: list[str], count: int | None) -> None:
    assert wanted(command) == count


def test_an_unknown_number_is_one_line_that_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --nproc_per_node"):
        spread()
    # A process that a launcher has numbered is one of several already.
    monkeypatch.setenv("RANK", "0")
    spread()
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("MASTER_PORT")
    spread()
