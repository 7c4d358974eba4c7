"""``probattn train`` as a user runs it: killed and resumed, interrupted, in two processes, from a YAML file."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest
from forked import Forked

pytest.importorskip("accelerate")

TRAIN = ["-m", "probattn", "train"]
SIZES = shlex.split(
    "--dim 16 --layers 1 --heads 2 --context 24 --batch 8 --dtype float64 --kind smooth --weight 0.5 --device cpu "
    "--evaluate-windows 16 --log-every 1 --evaluate-every 10 --warmup 2 --learning-rate 0.003"
)
# One thread a process: several that wait for each other on two cores are ten times slower.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*arguments, cwd, launcher=()):
    command = [sys.executable, *launcher, *TRAIN, *SIZES, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    text = "the quick brown fox jumps over the lazy dog; " * 300
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder


def lines(folder, name="loss"):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if name in line]


RANDOM = ["--corpus", "text.txt", "--steps", "120", "--save-every", "10", "--positions", "0.5", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def whole(folder, quietly):
    result = quietly("train", *SIZES, *RANDOM, "--out", "whole", cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    return folder / "whole"


# Kills of this command at random moments are in tests/faults; one of the two stays with the fast tests.
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT], ids=["SIGKILL", "Ctrl-C"]
)
@pytest.mark.filterwarnings("ignore:You are resuming training:UserWarning")
def test_a_run_cut_off_and_resumed_is_the_whole_run(folder, whole, here, number):
    out = folder / number.name
    with Forked("train", *SIZES, *RANDOM, "--out", out.name, cwd=folder) as process:
        process.until((out / "checkpoint-20").exists)
        process.send_signal(number)
        assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert lines(out)[-1]["step"] < 120, "it was over before it could be stopped"
    if number == signal.SIGINT:
        assert "--resume" in process.errors
    result = here("train", *SIZES, *RANDOM, "--out", out.name, "--resume", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout
    seen, expected = ({line["step"]: line["objective"] for line in lines(path)} for path in (out, whole))
    assert seen == expected
    assert [line["eval_loss"] for line in lines(out, "eval_loss")][-1] == lines(whole, "eval_loss")[-1]["eval_loss"]


# That two processes average to one is in tests/probattn/hf/test_barrier_backward.py with the fast tests.
@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        shlex.split(
            "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
            "--dynamo_backend no --main_process_port 0"
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_train_as_one(folder, here, launcher):
    options = ["--corpus", "text.txt", "--steps", "20", "--save-every", "0", "--positions", "1"]
    alone = folder / "alone"
    if not alone.exists():
        assert here("train", *SIZES, *options, "--out", "alone", cwd=folder).returncode == 0
    out = folder / launcher[1].rpartition(".")[2]
    result = run(*options, "--out", out.name, cwd=folder, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert len(lines(out)) == 20
    for found, expected in zip(lines(out), lines(alone), strict=True):
        for name in ("loss", "penalty", "objective", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), (name, found["step"])
    assert lines(out, "eval_loss")[-1]["eval_loss"] == pytest.approx(
        lines(alone, "eval_loss")[-1]["eval_loss"], rel=1e-6
    )


WATCHED = """
import gc
import accelerate
from torch.nn.parallel import DistributedDataParallel
from probattn.cli.app import main

def end_training(self, ended=accelerate.Accelerator.end_training):
    found = [part for part in gc.get_objects() if type(part) is DistributedDataParallel]
    print("wrappers:", len(found), flush=True)
    ended(self)

accelerate.Accelerator.end_training = end_training
main()
"""


@pytest.mark.slow
def test_the_wrapper_of_the_model_ends_before_the_group_of_processes(folder):
    # The other way round, the end of the group waits now and then for ever for threads that wait for Python's lock.
    (folder / "watched.py").write_text(WATCHED, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "watched.py", "train"]
    options = ["--corpus", "text.txt", "--steps", "1", "--save-every", "0", "--out", "watched"]
    command = [sys.executable, *launcher, *SIZES, *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wrappers: 0") == 2, result.stdout


def test_a_yaml_file_gives_what_the_flags_do_not(folder, here):
    settings = "steps: 2\nlearning-rate: 1e-3\nsave_every: 0\ncorpus: text.txt\nweight: 1\n"
    (folder / "settings.yaml").write_text(settings, encoding="utf-8")
    result = here("train", *SIZES, "--config", "settings.yaml", "--out", "yaml", cwd=folder)
    assert (result.returncode, result.stderr) == (0, "")
    options = json.loads((folder / "yaml" / "config.json").read_text())["options"]
    assert (options["steps"], options["save_every"]) == (2, 0)
    assert (options["weight"], options["learning_rate"]) == (0.5, 0.003)  # given as flags


def test_what_cannot_be_used_is_one_line_and_status_two(folder, here):
    result = here("train", *SIZES, "--corpus", "absent.txt", cwd=folder)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "absent.txt: no such file" in result.stderr
