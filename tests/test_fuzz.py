"""Inputs and damages that nobody thought of, in one process through `main()`: `make fuzz CASES=500 DAMAGES=50 SEED=0`.

A case is a command line, perhaps with a file, drawn by hypothesis; a few are small runs. A damage is done to one file
of a finished run; then status, compare, export and the same command look at it. Every command must end with exit code
0, 1, 2 or 130, within a minute, without a traceback, with ten lines of errors at most. After a damage the same command
gives the files of the untouched twin, or names what is damaged.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import _lru_cache_wrapper, partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, blank_charts, read_files
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from ddpm.networks import NETWORKS
from pipeline import config
from pipeline.cli.program import COMMANDS, main
from pipeline.config.checks import flatten, get_field_types
from pipeline.config.files import list_configurations

SECONDS, LINES, LETTERS = 60, 10, 1000  # of a command; of its errors; of one of their lines
RUN = [
    "run", "digits", *TINY, "evaluate.metrics=[fid,nll]", "evaluate.features=projection", "sample.steps=5",
    "train.sample_every=4", "train.keep=3", "figures.which=[samples,rate_distortion]", "figures.images=1",
    "cluster.workers=0",
]  # fmt: skip
# What the command gives or reads; the other files of a run hold dates, or are made again when they are read.
RESULTS = (
    "data/*/[!.]*.tar", "data/*/[!.]*.json", "tiny-*/train/step_00000006/[!.]*", "tiny-*/samples/*/[!.]*",
    "tiny-*/evaluation/*/[!.]*.*", "tiny-*/figures/*/[!.]*.*",
)  # fmt: skip
REMADE = ("nothing", "train/step_00000006", "samples", "evaluation/[!u]*")  # one of them is gone, too
# A small run keeps these: they would leave this machine or the scratch folder, or take long by right.
KEPT = ("cluster.storage", "cluster.workers", "cluster.ray_address", "data.source", "evaluate.features")
LOUD = "run shard train sample evaluate figures report ui submit jobs sweep reproduce"
ODD = r"""null ~ nan .nan inf -.inf true off 0x1F 0o17 010 1:30 1_000 1e3 1e400 -1 0 1 2 7 64 2147483648 1.5 -0.0 1e-300
9223372036854775808 [] [1,2] [a,b] [[1]] [null] [1 {} ${seed} ${oc.env:HOME} ${ ??? *x !!python/object:os.system ' '' "
"\x00" "\ud800" ² ٣ é / . .. ~nobody/x /dev/null /dev/zero /proc/self/mem folder fifo nowhere drawn.yaml image.png train
last best all every:2 every:0 every:² cycle fid [fid,fid] fid,nll samples digits npy lmdb parquet cifar10 unet fp32 bf16
http://127.0.0.1:9 postgresql://u:p@127.0.0.1:9/x sqlite:////proc/x.db 2024-01-01 = a=b %41 s3://b/p"""
SPACED = [
    "", " ", "{a: 1}", "{a: {b: [c]}}", "&a b", "!!binary aGk=", "a: b", "a #b", "- a", "\udce9", "a\nb", "\x1b[0m",
]  # fmt: skip
MISTAKEN = """. train train. .steps train.stesp train.steps.x steps é a.b.c model base experiment space space.seed rank
draw stop sweep.name sweep.space sweep.rank sweep.concurrent sweep.x"""
DAMAGES = ["flip", "cut", "empty", "json", "folder", "fifo", "link", "missing", "other"]
DAMAGES += ["unreadable"] * (os.geteuid() > 0)
VALUES = (None, [], {}, "x", -1, 1e308, True, {"files": {}}, ["x"], "../../x", 10**30)
TOKEN = re.compile(rb'"[^"]*"|[-\d.]+|true|false|null')  # of JSON
KINDS: dict[str, type[AssertionError]] = {}  # a class for each, so that hypothesis finds an example of each


def fail(kind: str, text: str) -> NoReturn:
    raise KINDS.setdefault(kind, type(kind, (AssertionError,), {}))(text)


def forget() -> None:
    """Clear the program's caches: a new process has none."""
    ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("pipeline", "ddpm")]
    for value in [value for module in ours for value in vars(module).values()]:
        if isinstance(value, _lru_cache_wrapper):
            value.cache_clear()


def call(words: list[str], case: object, seconds: int = SECONDS) -> str:
    """Run the program, and judge how it ends; returns all that it printed."""
    forget()
    shown, code, began = f"{case}\nddpm {shlex.join(words)[:2000]}", None, time.monotonic()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(seconds)
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as stream:
        logging.root.handlers = [logging.StreamHandler(stream)]
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
        except Exception as error:
            frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            ours = [name for name in frames if "/pipeline/" in name or "/ddpm/" in name]
            fail(f"{type(error).__name__} in {Path((ours or frames)[-1]).name}", f"{shown}\n{error}")
        finally:
            signal.alarm(0)
    errors = [line for line in stream.getvalue().splitlines() if line.strip()]
    more = [line for line in errors if not line.startswith(("usage:", " " * 6))]  # argparse's usage is long
    faults = {
        "more time than may be": time.monotonic() - began >= seconds,
        f"exit code {code}": code not in (0, 1, 2, 130),
        "an end without a reason": code and not errors,
        "more lines of errors than may be": len(more) > LINES,
        "a line of errors that nobody reads": max(map(len, errors), default=0) > LETTERS,
        "a traceback in the errors": any(line.startswith(("Traceback", '  File "')) for line in errors),
    }
    for kind in [kind for kind, is_true in faults.items() if is_true]:
        fail(kind, f"{shown}\nexit code {code}\n{stream.getvalue()[-3000:]}")
    return out.getvalue() + stream.getvalue()


KEYS = sorted({
    "", *MISTAKEN.split(), *flatten(config.to_dict(config.load_experiment("digits", []))),
    *(f"model.{key}" for network in NETWORKS.values() for key in get_field_types(network)),
    *(f"cluster.{key}" for key in get_field_types(config.ClusterConfig)),
})  # fmt: skip
plain = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
odd = st.sampled_from([*ODD.split(), *SPACED, *(letter * 300 for letter in "x1/")])
value = odd | st.integers().map(str) | st.floats().map(repr) | plain
key = st.sampled_from(KEYS) | plain.map(lambda text: text.replace("=", ""))
part = key.map(lambda text: text.partition(".")[0])
name = key.map(lambda text: text.rpartition(".")[2])
line = st.builds("{}: {}".format, part, value) | st.builds("{}: {{{}: {}}}".format, part, name, value)
content = st.lists(line, max_size=4).map("\n".join)
begin = st.sampled_from(["", "base: digits\n", "experiment: digits\nspace: {seed: [1, 2]}\n"])
file = st.builds("{}{}".format, begin, content) | plain
DRAWN = ["show drawn.yaml", "show digits --cluster drawn.yaml", "sweep drawn.yaml --dry-run"] * 12
NAMED = [f"show {name}" for name in (*list_configurations(), "dgits")]
QUIET = sorted({*(command.name for command in COMMANDS), "stauts", ""} - {*LOUD.split()})
heads = st.sampled_from([*DRAWN, *NAMED, "sweep digits_beta_dropout --dry-run", *QUIET, "run", "run"])


def check_command_line(case: tuple[str, list[str], str]) -> None:
    """Run one command line in the scratch folder, perhaps with a file; one in fifty is a small run."""
    head, words, text = case
    start = head.split() or [""]
    if head in QUIET:
        words = [word.partition("=")[2] for word in words[:2]] + words[2:]
    elif head == "run":
        large = re.compile(r"=.*([\d.]{3}|e\d)")
        small = [word for word in words if not word.startswith(KEPT) and not large.search(word)]
        start, words = RUN, [*small, "cluster.storage=runs"]
    Path("drawn.yaml").write_bytes(text.encode(errors="surrogateescape"))
    call([*start, *words], case)


def list_files(storage: Path) -> list[Path]:
    """Return the files of the first run of a storage root, of its data, and the root's own."""
    found = [*min(storage.glob("tiny-*")).rglob("*"), *(storage / "data").rglob("*"), *storage.glob("*")]
    return sorted(path.relative_to(storage) for path in found if path.is_file() and path.name != ".lock")


def damage(path: Path, kind: str, place: int, value: object, others: list[Path]) -> None:
    content, at = path.read_bytes(), place % max(1, path.stat().st_size)
    path.unlink()
    if kind in ("folder", "fifo", "link"):
        {"folder": os.mkdir, "fifo": os.mkfifo, "link": lambda path: os.symlink("nowhere", path)}[kind](path)
    elif kind == "other" and others:
        shutil.copyfile(others[-1], path)
    elif kind != "missing":
        texts = {"cut": content[:at], "empty": b"", "unreadable": content}
        start, stop, new = at, at + 1, bytes([content[at] ^ 1 << place % 8]) if content else b"x"
        if kind == "json" and (found := list(TOKEN.finditer(content)) if path.suffix == ".json" else []):
            span, new = found[place % len(found)].span(), json.dumps(value).encode()
            start, stop = (0, len(content)) if place % 5 == 0 else span
        path.write_bytes(texts.get(kind, content[:start] + new + content[stop:]))
        path.chmod(0 if kind == "unreadable" else 0o644)


def check_damage(twin: Path, case: tuple[Path, str, int, object]) -> None:
    """Damage a copy of the finished runs, look at it in every way, and give the command again."""
    path, kind, place, value = case
    with TemporaryDirectory() as folder:
        shutil.copytree(twin, storage := Path(folder) / "runs")
        first, second = (run.name for run in sorted(storage.glob("tiny-*")))
        alike = sorted(twin.glob(re.sub("[0-9a-f]{12,16}", "*", str(path))))
        damage(storage / path, kind, place, value, [other for other in alike if other != twin / path])
        looks = ["status"], ["compare", first, second], ["export", first, f"{folder}/a"]
        text = "".join(call([*words, f"cluster.storage={storage}"], case) for words in looks)
        for made in (storage / first).glob(REMADE[place % 4]):
            shutil.rmtree(made, ignore_errors=True)
        text += call([*RUN, f"cluster.storage={storage}"], case)
        there, wanted = (read_files(root, *RESULTS) for root in (storage, twin))
    wrong = [name for name in {*wanted, *there} if there.get(name) != wanted.get(name)]
    if wrong and str(path) not in text and (len(path.parts) < 3 or str(path.parent) not in text):
        fail("other files without a word", f"{case}\n{wrong[:3]} differ\n{text[-1500:]}")


def run_cases(name: str, check: Callable[..., None], cases: Any, count: int, number: int) -> int:
    """Check so many cases; print the smallest example of each kind of fault, and return how many kinds."""
    began, faults = time.monotonic(), []
    limits = {"database": None, "deadline": None, "suppress_health_check": [*HealthCheck]}
    options = settings(max_examples=max(1, count), **limits)
    try:
        seed(number)(options(given(cases)(lambda case: check(case))))()
    except (AssertionError, ExceptionGroup) as fault:
        faults = [*getattr(fault, "exceptions", [fault])]
    for fault in faults:
        print(f"--- {name}: {type(fault).__name__}\n{fault}\n")
    print(f"{name}: {count}, {time.monotonic() - began:.0f} s, seed {number}: {len(faults)} kinds of faults")
    return len(faults)


@patch.dict(os.environ, AWS_ENDPOINT_URL="http://127.0.0.1:9")  # nothing leaves this machine
@blank_charts()
def run_fuzz(cases: int, damages: int, number: int) -> int:
    """Do both parts in the working folder, which is a scratch folder; return the number of kinds of faults."""
    torch.set_num_threads(1)
    Path("folder").mkdir()
    Path("nowhere").symlink_to("gone")
    os.mkfifo("fifo")
    twin = Path("twin").absolute()
    for own in (0, 1):
        call([*RUN, f"seed={own}", f"cluster.storage={twin}"], "the twin", 600)  # with all imports
    lines = st.tuples(heads, st.lists(st.builds("{}={}".format, key, value), max_size=4), file)
    faults = run_cases("cases", check_command_line, lines, cases, number)
    kinds = st.sampled_from(DAMAGES), st.integers(0, 10**6), st.sampled_from(VALUES)
    damaged = st.tuples(st.sampled_from(list_files(twin)), *kinds)
    return faults + run_cases("damages", partial(check_damage, twin), damaged, damages, number)


@pytest.mark.slow
def test_drawn_command_lines_and_damages_end_as_they_must(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_fuzz(500, 50, 0) == 0


if __name__ == "__main__":
    with TemporaryDirectory(prefix="fuzz-") as scratch:
        os.chdir(scratch)
        sys.exit(min(1, run_fuzz(*map(int, sys.argv[1:]))))
