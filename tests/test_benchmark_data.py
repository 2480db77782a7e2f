"""The benchmark of the data reads every format, and its ratios are of what it says they are."""

import pytest
import torch

from recipes import benchmark_data
from recipes.benchmark_data import WRITERS, DataBenchmarkArguments, rows_per_second, waiting_share
from trainer.data.sources import READERS


class Clock:
    """A clock that only moves when something takes its time."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmark_data, "time", clock)
    return clock


class Rows(torch.utils.data.Dataset):
    """Numbers, each of which takes some seconds of the clock."""

    def __init__(self, number, clock, seconds):
        self.number, self.clock, self.seconds = number, clock, seconds

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        self.clock.now += self.seconds
        return index


def test_there_is_a_source_of_every_format():
    assert WRITERS.keys() == READERS.keys()


def test_the_first_batch_does_not_count(clock):
    assert rows_per_second(Rows(96, clock, 0.25), 0, list) == 4


def test_waiting_is_the_share_that_batches_take_beside_the_steps(clock):
    def step(batch):
        clock.now += 3.0

    # Three batches after the first, of two rows and a step each: 2 seconds of 5.
    assert waiting_share(Rows(8, clock, 1.0), 0, list, step, 2) == pytest.approx(0.4)
    assert waiting_share(Rows(8, clock, 0.0), 0, list, step, 2) == 0


def test_padding_by_length_is_less_and_no_strategy_loses_a_row():
    _, _, table = benchmark_data.measure_padding(DataBenchmarkArguments(num_rows=128))
    shares = {row[0]: float(row[1]) for row in table}
    assert shares["group_by_length"] < shares["random"] / 2 and shares["batch_rebalance"] < shares["random"] / 2
    assert all(0 < share < 1 for share in shares.values())


def test_a_part_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"`only` has \['speed'\]: name some of"):
        DataBenchmarkArguments(only=["speed"])


@pytest.mark.slow
def test_the_script_prints_every_table_and_writes_them(monkeypatch, capsys, tmp_path):
    page = tmp_path / "page.md"
    benchmark_data.main(DataBenchmarkArguments(num_rows=128, rounds=1, markdown=str(page)))
    printed, written = capsys.readouterr().out, page.read_text()
    for words in (
        *READERS,
        "Rows per second of a reader",
        "2 processes",
        "collator / step",
        "waiting for batches",
        "skipped",
    ):
        assert words in printed and words in written
    torch.set_num_threads(1)


@pytest.mark.parametrize("setting", [{"num_rows": 10}, {"rounds": 0}])
def test_too_little_to_measure_is_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"`{name}` must be at least .*, got {value}"):
        DataBenchmarkArguments(**setting)
