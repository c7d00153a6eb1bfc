"""Ctrl-C, SIGTERM and SIGHUP, as a process gets them."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from pipeline.compute.interrupt import SIGNALS, StopSignals, set_handlers, shield_children


@pytest.fixture(autouse=True)
def no_nohup():
    """A test that runs under nohup is told of a closed terminal too."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_asks_and_the_second_stops_at_once(tmp_path, first):
    before = [signal.getsignal(number) for number in SIGNALS]
    stop_file = tmp_path / ".stop"
    with StopSignals(stop_file) as interrupt:
        assert not interrupt.is_requested() and not stop_file.exists()
        signal.raise_signal(first)
        assert interrupt.is_requested() and stop_file.exists()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert not stop_file.exists()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_under_nohup_a_closed_terminal_asks_nothing():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    set_handlers(lambda *_: None)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)


def test_a_signal_to_the_whole_group_does_not_reach_shielded_children():
    """As Ray does it: a process takes the handlers over, and starts others."""
    handler = signal.getsignal(signal.SIGTERM)
    with shield_children():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for number in (signal.SIGTERM, signal.SIGHUP):
        child.send_signal(number)
    child.communicate(b"\n", timeout=20)
    assert child.returncode == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_program_is_imported_ends_it_without_a_traceback(tmp_path, number):
    """It falls into the making of a dataclass, where Python would end by SIGINT, and into an import."""
    kill = f"import os, time; os.kill(os.getpid(), {number}); time.sleep(9)"
    cases = ((["list"], "argparse", kill), (["show", "digits"], "yaml", f"exec('{kill}')"))
    for words, module, text in cases:
        (tmp_path / module).mkdir()
        (tmp_path / module / f"{module}.py").write_text(text)
        path = {"PYTHONPATH": f"{tmp_path / module}:{ROOT}"}
        command = [sys.executable, "-m", "pipeline", *words]
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | path)
        assert (outcome.returncode, outcome.stdout) == (130, ""), outcome
        assert outcome.stderr.startswith("interrupted") and outcome.stderr.count("\n") == 1


def test_a_closed_terminal_or_pipe_takes_no_message_and_stops_no_work(tmp_path):
    """Ctrl-C ends `ddpm run | tee log` on both sides."""
    code = (
        "import os, signal, sys; from pathlib import Path; from pipeline.compute.interrupt import StopSignals\n"
        "with StopSignals(Path(sys.argv[1])) as interrupt:\n"
        "    input(); signal.raise_signal(15); print('a line', flush=True); sys.exit(interrupt.is_requested() * 3)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".stop")], **pipes) as command:
        command.stdout.close()
        command.stdin.write(b"\n")
        command.stdin.close()
        assert command.stderr.read() == b"" and command.wait(60) == 3
