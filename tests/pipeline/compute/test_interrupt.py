"""Ctrl-C and SIGTERM, as the process itself gets them."""

import os
import signal
import time

import pytest

from pipeline.compute.interrupt import StopSignals


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)]
)
def test_the_first_signal_asks_and_the_second_stops_at_once(tmp_path, first, second):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_file = tmp_path / ".stop"
    with StopSignals(stop_file) as interrupt:
        assert not interrupt.is_requested() and not stop_file.exists()
        signal.raise_signal(first)
        assert interrupt.is_requested() and stop_file.exists()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
            time.sleep(5)
    assert not stop_file.exists()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
