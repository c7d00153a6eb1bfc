"""The texts that a person reads while work is under way."""

import pytest

from pipeline import console as progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(progress, "print_line", lines.append)
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: False, raising=False)
    return lines


SCENES = [  # name, total and words of the work; (seconds later, done, note) of each update; the lines
    # the time left is of the work's own pace, without the start
    (("train", 100, "steps"), 0, [(60, 1), (20, 21, "loss 0.1"), (79, 100)],
     ["train: 1/100 steps", "train: 21/100 steps, 1/s, 1 min 19 s left, loss 0.1",
      "train: 100/100 steps, 1/s"]),
    # a resumed stage does not count what was there
    (("train", 1000, "steps"), 600, [(20, 601), (20, 611)],
     ["train: 601/1000 steps", "train: 611/1000 steps, 30/min, 12 min 58 s left"]),
    # lines are seldom, and news
    (("sample", 10, "images"), 0, [(10, 1), (10, 2), (10, 2), (60, 2)],
     ["sample: 2/10 images, 6/min, 1 min 20 s left"]),
    (("sweep", 2, "trials"), 0, [(20, 0, "a 1/6"), (20, 0, "a 2/6"), (20, 0, "a 2/6")],
     ["sweep: 0/2 trials, a 1/6", "sweep: 0/2 trials, a 2/6"]),
    # large units that end together count from the beginning
    (("sweep", 6, "trials"), 0, [(300, 1), (20, 2)],
     ["sweep: 1/6 trials", "sweep: 2/6 trials, 22.5/h, 10 min 40 s left"]),
]  # fmt: skip


@pytest.mark.parametrize(("work", "start", "updates", "lines"), SCENES)
def test_lines_of_progress(clock, said, work, start, updates, lines):
    with progress.show_progress(*work, start=start) as shown:
        for seconds, *update in updates:
            clock[0] += seconds
            shown.update(*update)
    assert said == lines


def test_brackets_stay_and_rates_have_digits_that_mean_something():
    assert "metrics=[nll]" in progress.format_table(["command"], [["metrics=[nll]"]])
    assert list(map(progress.format_rate, (23_710.0, 13.26, 0.0512))) == ["23,710/s", "13.3/s", "3.07/min"]
