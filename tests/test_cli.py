"""The command line on a tiny model with a tokenizer of its own: one JSON object or readable lines, one-line errors."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from families import build
from mixcomp import api, artifact, cli, data, demo, evaluate, release, sources
from mixcomp.errors import BudgetError
from mixcomp.lowering.module import MixedLinear
from mixcomp.plans import Compiled
from mixcomp.progress import Bars
from mixcomp.report import describe

BUDGET = 5.0
SMALL = ["--samples", "4", "--length", "32"]


def letters() -> Any:
    """A tokenizer of single characters, 128 of them."""
    known = {chr(i): i for i in range(127)} | {"<unk>": 127}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="\x02")


def mixcomp(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    build("llama", num_hidden_layers=1).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def first(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder that a real ``mixcomp compile --json`` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("compiled") / "model"
    command = [sys.executable, "-m", "mixcomp", "compile", str(original), "--budget", str(BUDGET), "--out", str(out)]
    options = [*SMALL, "--device", "cpu", "--overrides", "model.layers.0.self_attn.q_proj=8", "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=out.parent)
    return out, done


@pytest.fixture(scope="module")
def compiled(first: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    return first[0]


def test_compile_prints_one_object_and_nothing_else(first: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = first
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert "second moments" in done.stderr, "progress goes to standard error"
    assert "peak" in done.stderr
    assert found["folder"] == str(folder)
    assert found["totals"]["stored_bpw"] <= BUDGET
    assert {"tokens": 128, "held_windows": 1, "held_tokens": 32}.items() <= found["run"]["calibration"].items()
    assert [row["strategy"] for row in found["run"]["gate"]] == ["joint", "uniform"]
    assert sum(row["kept"] for row in found["run"]["gate"]) == 1
    fixed = next(site for site in found["sites"] if site["name"] == "model.layers.0.self_attn.q_proj")
    assert fixed["widths"] == {"8": 64}


def test_the_report_is_recounted_from_the_stored_tensors(original: Path, compiled: Path) -> None:
    result = mixcomp("inspect", compiled, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    model = artifact.load(compiled)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, MixedLinear)}
    assert [site["name"] for site in found["sites"]] == list(modules)
    stored = sum(8 * tensor.nbytes for m in modules.values() for tensor in m.packed().tensors().values())
    weights = sum(m.in_features * m.out_features for m in modules.values())
    totals = found["totals"]
    assert (totals["stored_bits"], totals["weights"]) == (stored, weights)
    assert totals["stored_bpw"] == stored / weights <= BUDGET
    assert totals["payload_bits"] == sum(site["payload_bits"] for site in found["sites"]) < stored
    rest = sum(p.nbytes for p in model.parameters())
    assert totals["checkpoint_bytes"] == stored // 8 + rest
    assert totals["original_bytes"] == sum(p.nbytes for p in sources.load_original(str(original), "cpu").parameters())
    for site in found["sites"]:
        module = modules[site["name"]]
        widths = module.fmt.row_widths()
        assert site["widths"] == {str(w): widths.count(w) for w in sorted(set(widths))}
        assert site["reorder"] in ("none", "scatter", "absorbed")
        assert (site["reorder"] == "scatter") == module.fmt.scatter
        assert set(site["paths"]) == {"1", "512"}
    assert any("lm_head" in name for name in found["left_alone"])


def test_inspect_shows_every_site_to_people(compiled: Path) -> None:
    result = mixcomp("inspect", compiled)
    assert result.exit_code == 0, result.output
    for words in ("down_proj", "left alone: lm_head", "payload", "stored", "checkpoint", "calibration"):
        assert words in result.stdout


def test_eval_scores_as_the_library_does(original: Path, compiled: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 20, encoding="utf-8")
    options = ["--text", text, "--against", original, "--window", "40", "--limit", "6", "--device", "cpu"]
    result = mixcomp("eval", compiled, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    windows = evaluate.text_windows(letters(), text.read_text(encoding="utf-8"), 40, 6)
    expected = evaluate.evaluate(artifact.load(compiled), windows, sources.load_original(str(original), "cpu"))
    assert {key: found[key] for key in expected.to_json()} == expected.to_json()
    assert found["tokens"] == 6 * 39
    assert found["kl"] > 0
    shown = mixcomp("eval", compiled, *options)
    assert f"{expected.ppl:.4f}" in shown.stdout
    assert f"{expected.kl:.5f} nats" in shown.stdout
    plain = mixcomp("eval", original, *options[:2], *options[4:], "--json")
    assert json.loads(plain.stdout)["ppl"] == found["reference_ppl"], "an original model can be scored as well"


def test_eval_takes_the_bundled_text_by_default(compiled: Path) -> None:
    result = mixcomp("eval", compiled, "--limit", "1", "--device", "cpu", "--json")
    found = json.loads(result.stdout)
    assert (found["window"], found["tokens"]) == (128, 127), "no window is longer than the model's positions"
    windows = evaluate.text_windows(letters(), data.read(data.EVALUATION), 128, 1)
    assert found["nll"] == evaluate.evaluate(artifact.load(compiled), windows).nll


def test_errors_for_people_leave_standard_output_empty() -> None:
    result = mixcomp("inspect", "no/such/folder")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("mixcomp: ")


def test_compile_for_people_replaces_an_older_folder(original: Path, compiled: Path, tmp_path: Path) -> None:
    shutil.copytree(compiled, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text(data.read(data.CALIBRATION)[:5000], encoding="utf-8")
    options = ["--calibration", text, "--strategy", "uniform", "--exclude", "re:.*v_proj", *SMALL, "--device", "cpu"]
    command = ["compile", original, "--out", tmp_path / "out", "--budget", "4.4bpw", "--min-coverage", "0.5"]
    result = mixcomp(*command, *options)
    assert result.exit_code == 0, result.output
    assert "text file text.txt: 4 windows of 32 tokens" in result.stdout
    assert "budget      4.4 bits per weight (stored)" in result.stdout
    assert "left alone: model.layers.0.self_attn.v_proj" in result.stdout
    facts = describe(artifact.load(tmp_path / "out"))
    assert facts.stored_bpw <= 4.4
    assert not any("v_proj" in site.name for site in facts.sites)


ERRORS = {
    "a budget without a unit": (["compile", "ORIGINAL", "--budget", "4.4x", "--out", "OUT"], "ConfigError", "4.4x"),
    "an infinite budget": (["compile", "ORIGINAL", "--budget", "inf", "--out", "OUT"], "BudgetError", "inf"),
    "a budget below the floor": (["compile", "ORIGINAL", "--budget", "1.1", "--out", "OUT"], "BudgetError", "floor"),
    "a misspelt strategy": (
        ["compile", "ORIGINAL", "--budget", "4.4", "--out", "OUT", "--strategy", "jonit"],
        "ConfigError",
        "did you mean 'joint'",
    ),
    "an override without a width": (
        ["compile", "ORIGINAL", "--budget", "4.4", "--out", "OUT", "--overrides", "lm_head"],
        "ConfigError",
        "PATTERN=WIDTH",
    ),
    "a folder of other things": (
        ["compile", "ORIGINAL", "--budget", "4.4", "--out", "."],
        "ArtifactError",
        "another folder",
    ),
    "missing calibration": (
        ["compile", "ORIGINAL", "--budget", "4.4", "--out", "OUT", "--calibration", "absent.txt"],
        "InputError",
        "absent.txt",
    ),
    "a missing model": (["compile", "no/such/model", "--budget", "4.4", "--out", "OUT"], "InputError", "no/such/model"),
    "an unknown device": (
        ["compile", "ORIGINAL", "--budget", "4.4", "--out", "OUT", "--device", "abacus"],
        "ConfigError",
        "abacus",
    ),
    "a plan of nothing": (["plan", "ORIGINAL"], "ConfigError", "--budget"),
    "a plan to write without a budget": (["plan", "ORIGINAL", "--curve", "--out", "OUT"], "ConfigError", "--budget"),
    "a plan of no measurement": (["plan", "ORIGINAL", "--budget", "4.4"], "ArtifactError", "measurement.json"),
    "a measurement over other things": (["measure", "ORIGINAL", "--out", "ORIGINAL"], "ArtifactError", "did not write"),
    "a bad option of measure": (["measure", "ORIGINAL", "--out", "OUT", "--seed", "-1"], "ConfigError", "seed"),
    "a missing plan": (["apply", "ORIGINAL", "--plan", "absent.json", "--out", "OUT"], "ArtifactError", "absent.json"),
    "a model that is not compiled": (["inspect", "ORIGINAL"], "ArtifactError", "mixcomp"),
    "a missing text": (["eval", "ORIGINAL", "--text", "absent.txt"], "InputError", "absent.txt"),
    "too short a text": (["eval", "ORIGINAL", "--window", "150000"], "InputError", "150,000"),
    "a window beyond the positions": (
        ["eval", "ORIGINAL", "--window", "500", "--limit", "1"],
        "CalibrationError",
        "128",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_one_object(case: str, original: Path, tmp_path: Path) -> None:
    arguments, kind, words = ERRORS[case]
    places = {"ORIGINAL": str(original), "OUT": str(tmp_path / "out")}
    command = [places.get(a, a) for a in arguments]
    result = mixcomp(*command, "--json")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert error["type"] == kind
    assert words in error["message"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mixcomp: ")
    assert words in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("failure", "code", "kind"),
    [
        (RuntimeError("a bug\nof two lines"), 1, "RuntimeError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "OutOfMemoryError"),
    ],
)
def test_failures_that_are_not_ours(
    failure: BaseException, code: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(artifact, "load", fail)
    result = mixcomp("inspect", "anything", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["type"] == kind
    if kind == "RuntimeError":
        assert result.exception is failure, "a bug keeps its traceback"


def test_what_libraries_print_stays_off_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*_: Any, **__: Any) -> None:
        print("look at me")
        raise BudgetError("no")

    monkeypatch.setattr(artifact, "load", noisy)
    result = mixcomp("inspect", "anything", "--json")
    assert json.loads(result.stdout) == {"error": {"type": "BudgetError", "message": "no"}}
    assert "look at me" in result.stderr


def test_demo_tells_the_whole_story(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "fetch", lambda _: original)
    monkeypatch.setitem(demo.SIZES, "cpu", demo.Size((4, 32), (3, 64)))
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    result = mixcomp("demo", "--out", tmp_path / "demo", "--budget", "5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for words in ("4-bit grid", "payload", "stored", "checkpoint", "before", "after", "perplexity", "report"):
        assert words in result.stdout
    written = json.loads((tmp_path / "demo" / "report.json").read_text(encoding="utf-8"))
    assert written["sizes"]["stored_bpw"] <= 5
    assert written["evaluation"]["tokens"] == 3 * 63
    assert written["sentence_before"].startswith(demo.PROMPT)
    assert artifact.load(written["folder"]).config.vocab_size == 128


def test_demo_takes_a_model_of_ones_own(
    original: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_at_once(model: Any, _budget: Any, **options: Any) -> Any:
        assert options["length"] == 128, "no longer than the model's positions"
        loaded = artifact.load(compiled)
        loaded.mixcomp = Compiled(loaded.mixcomp.plan, {"seconds": 1.0, "gate": []})
        return loaded

    monkeypatch.setattr(api, "compile", compile_at_once)
    monkeypatch.setitem(demo.SIZES, "cpu", demo.Size((4, 500), (1, 500)))
    monkeypatch.setattr(demo, "NEW_TOKENS", 1)
    result = mixcomp("demo", original, "--out", tmp_path, "--device", "cpu", "--json")
    found = json.loads(result.stdout)
    assert found["note"] is None
    assert found["model"] == str(original)
    assert found["evaluation"]["window"] == 128


STEPS = [
    ("outer", 0, 1),
    ("inner", 0, 2),
    ("inner", 2, 2),
    ("inner", 2, 2),
    ("outer", 1, 1),
    ("inner", 0, 0),
    ("open", 0, 3),
]


def test_progress_away_from_a_terminal_is_a_line_per_finished_stage() -> None:
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=False)).shown() as bars:
        for step in STEPS:
            bars(*step)
    lines = out.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["inner", "outer", "open"]
    assert all(re.fullmatch(r"\w+: \d+\.\d s, peak \d+\.\d GiB.*", line) for line in lines)


def test_progress_on_a_terminal_shows_bars_time_left_and_memory() -> None:
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=True, width=120)).shown() as bars:
        for step in STEPS:
            bars(*step)
    for words in ("outer", "inner", "2/2", "left", "peak", "GiB"):
        assert words in out.getvalue()


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom mixcomp import cli\n"
        "for verb in ('compile', 'measure', 'plan', 'apply', 'eval', 'inspect', 'demo'):\n"
        "    done = CliRunner().invoke(cli.app, [verb, '--help'])\n"
        "    assert done.exit_code == 0 and '--json' in done.stdout, done.output\n"
        "print([name for name in ('torch', 'transformers', 'scipy', 'networkx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_measure_plan_and_apply_are_compile(original: Path, compiled: Path, tmp_path: Path) -> None:
    measured, plan, out = tmp_path / "measured", tmp_path / "plan.json", tmp_path / "out"
    result = mixcomp("measure", original, "--out", measured, *SMALL, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sites"] == 7
    fixed = ["--overrides", "model.layers.0.self_attn.q_proj=8"]
    result = mixcomp("plan", measured, "--budget", BUDGET, *fixed, "--out", plan, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["totals"]["stored_bpw"] <= BUDGET
    assert plan.read_bytes() == (compiled / "plan.json").read_bytes()
    shown = mixcomp("plan", measured, "--budget", "4", "--against", plan, "--curve")
    assert shown.exit_code == 0, shown.output
    for words in ("stored", "rows", "overlap", "predicted loss"):
        assert words in shown.stdout
    curve = json.loads(mixcomp("plan", measured, "--curve", "--json").stdout)["curve"]
    assert len(curve) > 50
    result = mixcomp(
        "apply", original, "--plan", plan, "--measurement", measured, "--out", out, "--device", "cpu", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["run"]["calibration"]["source"].startswith("measured: ")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in compiled.iterdir()}


def test_the_library_and_the_command_agree(original: Path, compiled: Path) -> None:
    model = sources.load_original(str(original), "cpu")
    fixed = {"model.layers.0.self_attn.q_proj": 8}
    api.compile(model, BUDGET, tokenizer=letters(), samples=4, length=32, overrides=fixed)
    loaded = artifact.load(compiled)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
