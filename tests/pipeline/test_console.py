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


def test_time_left_is_of_the_works_own_pace(clock, said):
    with progress.show_progress("train", 100, "steps") as shown:
        clock[0] += 60  # starting up
        shown.update(1)
        clock[0] += 20
        shown.update(21, "loss 0.1")
        clock[0] += 79
        shown.update(100)
    assert said == [
        "train: 1/100 steps",
        "train: 21/100 steps, 1/s, 1 min 19 s left, loss 0.1",
        "train: 100/100 steps, 1/s",
    ]


def test_a_resumed_stage_does_not_count_what_was_there(clock, said):
    with progress.show_progress("train", 1000, "steps", start=600) as shown:
        clock[0] += 20
        shown.update(601)
        clock[0] += 20
        shown.update(611)
    assert said[-1] == "train: 611/1000 steps, 30/min, 12 min 58 s left"


def test_lines_are_seldom_and_news(clock, said):
    with progress.show_progress("sample", 10, "images") as shown:
        for done in (1, 2, 2):
            clock[0] += 10
            shown.update(done)
        clock[0] += 60
        shown.update(2)
    assert said == ["sample: 2/10 images, 6/min, 1 min 20 s left"]
    said.clear()
    with progress.show_progress("sweep", 2, "trials") as shown:
        for note in ("a 1/6", "a 2/6", "a 2/6"):
            clock[0] += 20
            shown.update(0, note)
    assert said == ["sweep: 0/2 trials, a 1/6", "sweep: 0/2 trials, a 2/6"]


def test_large_units_that_end_together_count_from_the_beginning(clock, said):
    with progress.show_progress("sweep", 6, "trials") as shown:
        clock[0] += 300
        shown.update(1)
        clock[0] += 20
        shown.update(2)
    assert said == ["sweep: 1/6 trials", "sweep: 2/6 trials, 22.5/h, 10 min 40 s left"]


def test_a_table_shows_brackets_as_they_were_typed():
    assert "metrics=[nll]" in progress.format_table(["command"], [["metrics=[nll]"]])


def test_rates_have_digits_that_mean_something():
    assert list(map(progress.format_rate, (23_710.0, 13.26, 0.0512))) == ["23,710/s", "13.3/s", "3.07/min"]
