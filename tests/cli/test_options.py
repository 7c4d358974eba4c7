"""One source of options: flags, YAML keys, help, reference and the Python call are one dataclass per command."""

import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from cyclopts import CycloptsError

from probattn.cli.app import COMMANDS, app, main
from probattn.cli.command import command, flags
from probattn.cli.explore import ExploreOptions
from probattn.cli.reference import options_of, reference
from probattn.errors import InputError
from probattn.inference.bench.run import BenchOptions
from probattn.inference.fit import METHODS, FitOptions, LaplaceConfig, MapConfig, NutsConfig, SviConfig, TextOptions
from probattn.inference.language import LanguageFit
from probattn.inference.support import SupportOptions
from probattn.inference.training.options import TrainOptions
from probattn.inference.verify import VerifyOptions
from probattn.models.language import LanguageConfig

REFERENCE = Path(__file__).parents[2] / "docs" / "api" / "command-line.md"
# What a command cannot do without.
NEEDED = {"fit": ["--data", "hidden.npz"], "support": ["a text", "--model", "folder"]}
PARTS = [(name, {}) for name in COMMANDS if name != "fit"] + [("fit", {"method": method}) for method in METHODS]


@cache
def stand_in(name):
    """A command that only keeps its options, and where it keeps them."""
    seen = []
    return command(name, options_of(name)[0], seen.append), seen


def parse(name, *words):
    """The options that the command line makes of some words."""
    run, seen = stand_in(name)
    tokens = [*NEEDED.get(name, []), *map(str, words)]
    run(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    return seen.pop()


@cache
def defaults(name, *words):
    """The options without any that a test gives; they are frozen, so that all tests can share them."""
    return parse(name, *words)


def words_of(name, chosen):
    return [word for field, part in chosen.items() for word in (f"--{field}", part)]


LISTED = [
    pytest.param(name, chosen, flag, id=f"{'-'.join([name, *chosen.values()])}{flag.name}")
    for name, chosen in PARTS
    for flag in flags(options_of(name)[0], chosen)
    if chosen.get("method", "nuts") == "nuts" or (flag.path[0] == "method" and len(flag.path) > 1)
]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("verify", VerifyOptions()),
        ("fit", FitOptions(data="hidden.npz")),
        ("train", TrainOptions()),
        ("support", SupportOptions("a text", "folder")),
        ("explore", ExploreOptions()),
        ("bench", BenchOptions()),
    ],
    ids=COMMANDS,
)
def test_the_bare_command_line_is_the_dataclass_with_its_defaults(name, expected):
    assert parse(name) == expected


@pytest.mark.parametrize(("method", "config"), METHODS.items())
def test_a_method_on_the_command_line_is_its_options_with_their_defaults(method, config):
    assert parse("fit", "--method", method) == FitOptions(data="hidden.npz", method=config())


@pytest.mark.parametrize(
    ("name", "words", "expected"),
    [
        (
            "fit",
            "--method svi --steps 30 --guide low_rank --renyi 0.5 --compare jacobian,heads --no-jacobian --seed 3",
            FitOptions(
                data="hidden.npz",
                method=SviConfig(steps=30, guide="low_rank", renyi=0.5),
                compare=("jacobian", "heads"),
                jacobian=False,
                seed=3,
            ),
        ),
        (
            "fit",
            "--chains 2 --warmup 1e2 --chain-method process --rank 1",
            FitOptions(
                data="hidden.npz", method=NutsConfig(chains=2, warmup=100, chain_method="process", seed=0), rank=1
            ),
        ),
        ("fit", "--method=map --batch 8", FitOptions(data="hidden.npz", method=MapConfig(batch=8))),
        ("fit", "--method laplace --draws 9", FitOptions(data="hidden.npz", method=LaplaceConfig(draws=9))),
        (
            "verify",
            "--steps 24 --context 16 --claims jacobian --claims margin --seed 5",
            VerifyOptions(
                fit=LanguageFit(steps=24), model=LanguageConfig(1, context=16), claims=["jacobian", "margin"], seed=5
            ),
        ),
        (
            "train",
            "--dtype bf16 --compile --report-to wandb,mlflow",
            TrainOptions(precision="bf16", compile=True, report_to=("wandb", "mlflow")),
        ),
    ],
)
def test_the_same_options_are_the_same_run(name, words, expected):
    assert parse(name, *words.split()) == expected
    assert parse(name) != expected


def test_one_seed_per_run():
    assert FitOptions(data="x", method=NutsConfig(seed=4), seed=7).method.seed == 7
    assert parse("verify", "--seed", 7).fit.seed == 7
    assert replace(FitOptions(data="x", seed=7), seed=8).method.seed == 8


def leaves(options):
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from leaves(value)
        else:
            yield field.name


def test_every_field_is_a_flag():
    for name, example in {"verify": VerifyOptions(), "train": TrainOptions(), "fit": FitOptions(data="x")}.items():
        found = {flag.path[-1] for flag in flags(type(example))}
        assert found - {"method"} == set(leaves(example)) - {"vocabulary"}
        assert {"vocabulary"} <= set(leaves(example)) or name != "verify"


def test_two_flags_of_one_name_and_a_field_without_a_text_are_refused():
    from dataclasses import dataclass, field

    @dataclass(frozen=True)
    class Silent:
        """Options."""

        steps: int = 1

    with pytest.raises(TypeError, match="does not describe steps"):
        flags(Silent)

    @dataclass(frozen=True)
    class Twice:
        """Options.

        Attributes:
            one: first fit.
            two: second fit.
        """

        one: MapConfig = field(default_factory=MapConfig)
        two: LanguageFit = field(default_factory=LanguageFit)

    with pytest.raises(TypeError, match="two flags --steps"):
        flags(Twice)


def helped(words):
    """The help on a terminal of 80 columns."""
    seen = io.StringIO()
    with redirect_stdout(seen):
        app([*words, "--help"], exit_on_error=False, result_action="return_value")
    return seen.getvalue()


@pytest.mark.parametrize(("name", "chosen"), PARTS)
def test_help_is_complete_and_readable_on_eighty_columns(name, chosen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = helped([name, *words_of(name, chosen)])
    assert max(map(len, text.splitlines())) <= 80
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())
    for flag in flags(options_of(name)[0], chosen):
        shown = flag.path[-1].upper() if flag.metadata.get("positional") else flag.name
        assert re.search(rf"(?<!\S){shown}(?!\S)", plain), shown
        assert re.match(r"[A-Z0-9].*\.$", flag.help), flag.help  # a phrase that stands alone
        assert not re.match(r"(Of|From|At|By|How|What|Which|Whether|Where) ", flag.help) or flag.name == "--device"
        assert "`" not in flag.help
    for own in ("--config", "--debug"):
        assert own in plain


@pytest.mark.parametrize(("name", "chosen", "flag"), LISTED)
def test_the_reference_has_every_flag(name, chosen, flag):
    text = REFERENCE.read_text(encoding="utf-8")
    section = text[text.index(f"## probattn {name}\n") :].split("\n## ")[0]
    assert f"`{flag.path[-1].upper()}`" in section if flag.metadata.get("positional") else f"`{flag.name}" in section
    assert flag.help.replace("|", r"\|") in section


def test_the_reference_is_up_to_date():
    assert REFERENCE.read_text(encoding="utf-8") == reference(), (
        "run: python -m probattn.cli.reference > docs/api/command-line.md"
    )


def outside(flag):
    """Values that a flag must refuse, as a person would write them."""
    if get_origin(flag.kind) is Literal:
        return ["nonsense"]
    if flag.range is None:
        return []
    integer = int in (flag.kind, *get_args(flag.kind))
    below = [bound - 1 for bound in (flag.range.least, flag.range.above) if bound is not None]
    above = [bound + 1 for bound in (flag.range.most, flag.range.below) if bound is not None]
    return [*below, *above, "many", *(["1.5", "true"] if integer else ["nan", "inf"])]


@pytest.mark.parametrize(
    ("name", "chosen", "flag"),
    [entry for entry in LISTED if outside(entry.values[2]) and not entry.values[2].metadata.get("choices")],
)
def test_flags_yaml_keys_and_arguments_obey_one_rule(name, chosen, flag, tmp_path):
    settings = tmp_path / "settings.yaml"
    for value in outside(flag):
        with pytest.raises(CycloptsError) as refused:
            parse(name, *words_of(name, chosen), f"{flag.name}={value}")
        assert flag.name in str(refused.value)
        settings.write_text(yaml.safe_dump({flag.path[-1]: value}))
        with pytest.raises(CycloptsError) as refused_too:
            parse(name, *words_of(name, chosen), "--config", settings)
        assert flag.path[-1] in str(refused_too.value)
        assert str(settings) in str(refused_too.value)
        if value in ("nan", "inf"):
            value = float(value)
        holder = options_of(name)[0] if len(flag.path) == 1 else type(nested(name, chosen, flag))
        given = {"data": "hidden.npz"} if holder is FitOptions else {}
        given |= {"source": "a", "model": "b"} if holder is SupportOptions else {}
        given |= {"vocabulary": 3} if holder is LanguageConfig else {}
        with pytest.raises(InputError, match=f"^{flag.path[-1]} is .*; (it must be|use one of) "):
            holder(**given, **{flag.path[-1]: value})
    for value in (None, [1, 2], [[3.0]]):  # an array is no number either
        settings.write_text(yaml.safe_dump({flag.path[-1]: value}))
        if value is None and type(None) in get_args(flag.kind):
            continue
        with pytest.raises(CycloptsError, match=flag.path[-1]):
            parse(name, *words_of(name, chosen), "--config", settings)


def nested(name, chosen, flag):
    options = defaults(name, *words_of(name, chosen))
    for part in flag.path[:-1]:
        options = getattr(options, part)
    return options


@pytest.mark.parametrize(
    ("name", "chosen", "flag"), [entry for entry in LISTED if entry.values[2].default is not MISSING]
)
def test_defaults_are_accepted_when_they_are_written_out(name, chosen, flag, tmp_path):
    default = flag.default
    if default in (None, "", ()):
        return
    written = (
        ",".join(default)
        if isinstance(default, tuple)
        else str(default).lower()
        if default in (True, False)
        else str(default)
    )
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"{flag.path[-1]}: {written}\n")
    assert parse(name, *words_of(name, chosen), "--config", settings) == defaults(name, *words_of(name, chosen))


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Runs ``probattn fit`` with a YAML file; returns the one line of error."""
    monkeypatch.chdir(tmp_path)

    def run(content, *words):
        Path("settings.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--data", "hidden.npz", "--config", "settings.yaml", *words])
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("probattn: ")
        return captured.err

    return run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("warmup: many\n", r'\[warmup\] from settings.yaml: unable to convert "many" into int'),
        ("warmup: 10.5\n", r'\[warmup\] from settings.yaml: unable to convert "10.5" into int'),
        ("warmup: true\n", r'unable to convert "True" into int'),
        ("warmup: 3\n", r'"3" for \[warmup\] provided by settings.yaml. It must be at least 20'),
        ("warmup: null\n", r'\[warmup\] from settings.yaml: unable to convert "null" into int'),
        ("warmup: [100, 200]\n", r"\[warmup\] from settings.yaml: unable to convert"),
        ("warmpu: 100\n", r'"\[warmpu\]" from settings.yaml. Did you mean --warmup\?'),
        ("warmup: {steps: 100}\n", "warmup holds a mapping; write its options on lines of their own"),
        ("method: {warmup: 100}\n", "method holds a mapping"),
        ("method: gibbs\n", r'"gibbs" for \[method\] from settings.yaml. Choose from: "nuts"'),
        ("jacobian: 3\n", r'\[jacobian\] from settings.yaml: unable to convert "3" into bool'),
        ("compare: null\n", r"\[compare\]: null is no list"),
        ("compare: [mask, depth]\n", r'"depth" for \[compare\] from settings.yaml'),
        ("out: null\n", r"out"),
        ("guide: flow\n", "--guide belongs to --method svi, and the method is nuts"),
        ("method: svi\nchains: 3\n", "--chains belongs to --method nuts, and the method is svi"),
        ("- warmup\n", "holds a list; write a mapping"),
        ("warmup: [1\n", "not YAML"),
        ("rank: 0\n", "It must be at least 1"),
        ("context: 16\n", "context goes with corpus, and data is given"),
        ("[" * 5000 + "]" * 5000, "nested more than 8 deep"),
        ("a: " + "{b: " * 5000 + "}" * 5000, "nested more than 8 deep"),
        (f"warmup: {'9' * 5000}\n", "holds a value that cannot be read"),
        (f"warmup: {'9' * 2000}\n", r"warmup is a int; it must be an integer below 2\^63"),
        (f"prior-scale: {'9' * 2000}\n", "prior"),
        ("prior-scale: 1e999\n", "prior"),
        ("warmup: 2001-99-99\n", "holds a value that cannot be read|unable to convert"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "uses references"),
        ('out: "a\\0b"\n', "a NUL character is in no name of a file"),
        ("a\0b: 3\n", "not YAML"),
    ],
)
def test_a_yaml_file_that_cannot_be_used(fails, content, message):
    assert re.search(message, fails(content))


def test_pipes_devices_and_floods_for_a_file_are_refused_unread(fails, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe, not a regular file" in fails("", "--config", "pipe")
    assert "a device, not a regular file" in fails("", "--config", "/dev/zero")
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    assert "1,048,577 bytes; at most 1,048,576 are read" in fails("", "--config", "large")


def test_a_file_that_is_not_there(fails):
    assert "--config absent.yaml: cannot be read (No such file or directory)" in fails("", "--config", "absent.yaml")


def test_flags_overrule_the_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("method: svi\nsteps: 70\nlearning-rate: 1e-3\ncompare: [jacobian]\nresume: yes\nrank: null\n")
    options = parse("fit", "--config", path, "--steps", 80, "--no-resume")
    assert options.method == SviConfig(steps=80, learning_rate=1e-3)
    assert (options.compare, options.resume, options.rank) == (("jacobian",), False, None)
    assert parse("fit", "--config", path, "--steps", 80).resume
    path.write_text("")
    assert parse("fit", "--config", path) == parse("fit")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--warmpu", "30"], r"Unknown option: --warmpu. Did you mean --warmup\? See probattn fit --help."),
        (
            ["--method", "svi", "--chains", "2"],
            "--chains belongs to --method nuts, and the method is svi; leave it out",
        ),
        (["--method", "gibbs"], r'Invalid value "gibbs" for --method. Choose from: "nuts", "svi", "laplace", "map".'),
        (["--warmup"], "--warmup requires an argument"),
        (["stray"], "'stray' belongs to no option"),
        (["--warmup", "30", "--warmup", "40"], "specified multiple times"),
        (["--vocabulary", "3"], "Unknown option: --vocabulary"),
    ],
)
def test_a_command_line_that_cannot_be_used(fails, words, message):
    assert re.search(message, fails("", *words))


def test_options_that_do_not_go_together():
    with pytest.raises(InputError, match=r"give either data .* or corpus"):
        FitOptions()
    with pytest.raises(InputError, match=r"give either data .* or corpus"):
        FitOptions(data="x", corpus="python-docs")
    with pytest.raises(InputError, match="prior_scale goes with data, and corpus is given; leave it out"):
        FitOptions(corpus="python-docs", prior_scale=0.5)
    with pytest.raises(InputError, match="dim goes with corpus, and data is given; leave it out"):
        FitOptions(data="x", text=TextOptions(dim=8))
    with pytest.raises(InputError, match="compare needs draws"):
        FitOptions(data="x", method=MapConfig(), compare=["heads"])
    with pytest.raises(InputError, match="method is 'svi'; it must be of type NutsConfig or SviConfig or"):
        FitOptions(data="x", method="svi")
    with pytest.raises(InputError, match="fit is a MapConfig; it must be of type LanguageFit"):
        VerifyOptions(fit=MapConfig())


def commands_in(page):
    """The command lines that a page shows in its blocks of shell, and those in the README's sentences."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    if page.name == "README.md":
        blocks += re.findall(r"`(probattn [^`]*)`", text)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "probattn" in words:
                yield words[words.index("probattn") + 1 :]


def test_the_commands_that_the_pages_show_are_accepted():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    shown = [words for page in pages for words in commands_in(page) if words]
    assert {words[0] for words in shown} >= {"verify", "fit", "train", "support", "explore"}
    for name, *words in shown:
        assert name in COMMANDS
        run, seen = stand_in(name)
        run(words, exit_on_error=False, print_error=False, result_action="return_value")
        assert isinstance(seen.pop(), options_of(name)[0])


def test_help_needs_none_of_the_libraries_behind_the_commands():
    program = (
        "import sys; from probattn.cli.app import app; app(['--help'], result_action='return_value'); "
        "app(['--version'], result_action='return_value'); "
        "sys.exit(bool({'torch', 'pyro', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in COMMANDS)
