"""The accuracy benchmarks on a tiny model: each one runs and goes on where it stopped, and its own mathematics is right."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import families
import measured
from mixcomp import data, manager
from mixcomp.config import Budget
from mixcomp.format import WIDTHS
from mixcomp.passes import AnnotateSalience, AssignPrecision, QuantizeWeights, ReorderFeatures, ScaleChannels
from mixcomp.passes.decision import Decisions
from mixcomp.passes.gptq import feedback
from mixcomp.passes.stacks import inputs, stack
from mixcomp.passes.tunable import Settled
from mixcomp.program import Program
from mixcomp.quant import dequantize, fit_mixed, round_nearest
from programs import context
from test_cli import letters

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHAPE = ["--window", "32", "--samples", "4", "--length", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny tied Llama with a tokenizer of letters, and a text in it."""
    folder = tmp_path_factory.mktemp("tiny")
    families.build("llama-tied").save_pretrained(folder)
    letters().save_pretrained(folder)
    (folder / "text.txt").write_text(data.read(data.EVALUATION)[:3000], encoding="utf-8")
    return folder


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark as it imports its neighbours."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def arguments(folder: Path, out: Path, *more: str, limit: bool = True) -> list[str]:
    text = str(folder / "text.txt")
    limits = ["--limit", "2"] if limit else []
    return [str(folder), "--calibration", text, text, "--text", text, *SHAPE, *limits, "--out", str(out), *more]


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
    return rows


def kl(row: dict[str, Any]) -> float:
    return float(row["scores"]["text.txt"]["kl"])


ABLATIONS = ["joint", "one width per site", "side branches", "priced again", "gamma: one constant", "float-group 64",
             "nearest rounding", "columns by row", "uniform", "mixllm", "slim", "gate"]  # fmt: skip


def test_ablation(tiny: Path, tmp_path: Path, load: Any) -> None:
    out = tmp_path / "ablation.json"
    given = arguments(tiny, out, "--budgets", "4.0", "--rows")
    load("ablation").main([*given, *ABLATIONS[:2]])
    first = out.read_text(encoding="utf-8")
    load("ablation").main([*given, *ABLATIONS])
    rows = rows_of(out)
    assert [row["row"] for row in rows] == ABLATIONS
    assert rows[:2] == json.loads(first)["rows"], "rows that were there were made again"
    assert "refused" in rows[ABLATIONS.index("mixllm")], "mixllm has no 2 bits"
    made = {row["row"]: row for row in rows if "refused" not in row}
    assert all(3.6 < row["stored_bits_per_weight"] <= 4.0 and kl(row) > 0 for row in made.values())
    losses = {name: row["second_order_loss"] for name, row in made.items() if name != "gate"}
    assert min(losses["joint"], losses["columns by row"]) < losses["uniform"] < losses["nearest rounding"]
    assert losses["gamma: one constant"] > losses["joint"]


def test_activations_of_eight_bits(tiny: Path, tmp_path: Path, load: Any) -> None:
    """Against the definition, one group at a time; a row of the ablation is judged with them, and only that."""
    common = load("common")
    x = torch.randn(3, 2, 300, generator=torch.Generator().manual_seed(0))
    x[1, 0, 130:140] *= 50
    x[0, 1] = 0
    found = common.eight_bits(x)
    for start in (0, 128, 256):
        part = x[..., start : start + 128]
        step = (part.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-5).half().float()
        codes = found[..., start : start + 128] / step
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert bool(((found[..., start : start + 128] - part).abs() <= 0.502 * step).all())
    out = tmp_path / "ablation.json"
    load("ablation").main(arguments(tiny, out, "--budgets", "5.0", "--rows", "mixllm float", "mixllm float, 8 bits"))
    plain, rounded = rows_of(out)
    assert plain["stored_bits_per_weight"] == rounded["stored_bits_per_weight"]
    assert plain["second_order_loss"] == rounded["second_order_loss"]
    assert kl(rounded) != kl(plain)


def test_accuracy(tiny: Path, tmp_path: Path, load: Any) -> None:
    out = tmp_path / "accuracy.json"
    load("accuracy").main(arguments(tiny, out, "--budgets", "4.0", "--methods", "joint:fast", "slim"))
    rows = rows_of(out)
    assert [(row["strategy"], row["effort"]) for row in rows] == [("joint", "fast"), ("slim", "fast")]
    assert all(3.6 < row["stored_bits_per_weight"] <= 4.0 and kl(row) > 0 for row in rows)


def test_results_of_other_arguments_are_not_mixed_in(tiny: Path, tmp_path: Path, load: Any) -> None:
    out, common = tmp_path / "rows.json", load("common")
    given = common.parser("").parse_args(arguments(tiny, out))
    results = common.Results(given, "command")
    results.make({"row": 1}, dict)
    results.make({"row": 2}, lambda: 1 / 0)
    with pytest.raises(SystemExit, match="rows that broke"):
        results.finish()
    assert not common.Results(given, "command").missing(row=1)
    given.seed = 1
    with pytest.raises(SystemExit, match="seed"):
        common.Results(given, "command")


def test_forms(tiny: Path, tmp_path: Path, load: Any) -> None:
    out = tmp_path / "forms.json"
    load("forms").main(arguments(tiny, out, "--budgets", "3.6"))
    rows = {row["row"]: row for row in rows_of(out)}
    assert set(rows) == set(load("forms").ROWS)
    for name in ("group per site", "scales per site", "form per site", "columns by row"):
        assert rows[name]["predicted_loss"] <= rows["joint"]["predicted_loss"] * 1.02, f"{name}: more choice, more loss"
    assert rows["joint"]["rank"] == 0
    assert all(
        0 < rows[name]["predicted_with_branches"] <= rows[name]["predicted_loss"] for name in ("rank 8", "rank 64")
    )
    assert all(row["stored_bits_per_weight"] <= 3.6 for row in rows.values())


def test_tuning(tiny: Path, tmp_path: Path, load: Any) -> None:
    out, module = tmp_path / "tuning.json", load("tuning")
    given = ["fast", "blocks:steps=2", "blocks:steps=2,place_rate=0.5", "model:steps=2"]
    module.main(arguments(tiny, out, "--budgets", "4.0", "--rows", *given))
    rows = rows_of(out)
    assert [row["row"] for row in rows] == given
    assert [list(row.get("stages", ())) for row in rows] == [[], ["tune-blocks"], ["tune-blocks"], ["tune-model"]]
    assert module.tuning("model:norm_rate=0.003,steps=7") == module.TuneModel(norm_rate=0.003, steps=7)
    for odd in ("scales", "model:rate=1"):
        with pytest.raises(SystemExit, match="row"):
            module.tuning(odd)


def test_tuning_on_written_text(tiny: Path, tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = load("tuning"), []

    def run(self: Any, program: Any, context: Any) -> Any:
        seen.append([sum(map(len, windows)) for windows in (context.batches, context.written)])
        return program

    monkeypatch.setattr(module.TuneBlocks, "run", run)
    scores = []
    for more in ([], ["--written"]):
        out = tmp_path / f"tuning{len(more)}.json"
        module.main(arguments(tiny, out, "--budgets", "4.0", "--rows", "fast", "blocks", *more))
        scores.append([row["scores"] for row in rows_of(out)])
    given, _ = seen[0]
    assert seen == [[given, 0], [given, 3 * given]]
    assert scores[0] == scores[1], "only what learns reads it"


def test_draws(tiny: Path, tmp_path: Path, load: Any) -> None:
    out = tmp_path / "draws.json"
    load("draws").main(arguments(tiny, out))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found["rows"]) == len(found["summary"]["pairs"]) == 3
    for pair in found["summary"]["pairs"]:
        assert 0 <= pair["by_chance"] <= pair["by_chance_within_sites"] <= pair["overlap"] <= 1
    assert found["summary"]["scores"]["text.txt"]["kl_standard_deviation"] > 0


def test_overlap_by_chance(load: Any) -> None:
    plans = [SimpleNamespace(sites={"a": {"widths": w}, "b": {"widths": "44444444"}}) for w in ("44445555", "44444455")]
    model, site = load("draws").by_chance(*plans)
    assert model == pytest.approx((4 * 2 / 16) / (4 + 2 - 4 * 2 / 16))
    assert site == pytest.approx((4 * 2 / 8) / (4 + 2 - 4 * 2 / 8))


def test_correlation(tiny: Path, tmp_path: Path, load: Any) -> None:
    out = tmp_path / "correlation.json"
    more = ["--held", "2", "--check", "2", "--budgets", "3.5", "5.0", "--each", "2"]
    load("correlation").main(arguments(tiny, out, *more, limit=False))
    found = json.loads(out.read_text(encoding="utf-8"))
    plans = [row for row in found["rows"] if "plan" in row]
    assert len(plans) == 2 * (2 + 5 * 2)
    assert all(abs(row["stored_bits_per_weight"] - row["budget"]) < 0.2 for row in plans)
    assert found["summary"]["all plans"]["spearman"] > 0.9
    singles = [row for row in found["rows"] if "single" in row]
    assert len(singles) == 14 + 7 + 2 + 1
    checks = {row["check"] for row in found["rows"] if "check" in row}
    assert checks == {"joint", "corrected by site", "corrected by kind"}


def test_scaled_channels_are_the_same_function(tiny: Path, load: Any) -> None:
    """Sites that are not in a plan are as they were, though those beside them are scaled."""
    common, correlation = load("common"), load("correlation")
    given = common.parser("").parse_args(arguments(tiny, tiny / "none.json", limit=False))
    setting = common.Setting.start(given)
    priced = setting.run(setting.program, ScaleChannels(), AnnotateSalience())
    bench = correlation.Bench.of(setting, priced, 2, 0)
    base, exact = (dict(model.named_parameters()) for model in (bench.judge.base, bench.judge.original))
    key = priced.open_sites()[0].weight.key
    assert not torch.allclose(base[key], exact[key], rtol=1e-2)
    assert bench.kl({}, bench.held) < 1e-7


@pytest.mark.parametrize("size", [7, 24, 64, 192, 576])
def test_rotations_are_orthogonal(size: int, load: Any) -> None:
    """Powers of two, odd sizes, and what real models have."""
    found = load("transforms").orthogonal(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    assert float(found.abs().max()) < 1


def test_transforms(tiny: Path, tmp_path: Path, load: Any) -> None:
    out = tmp_path / "transforms.json"
    methods = ["scale", "rotate both"]
    load("transforms").main(arguments(tiny, out, "--budgets", "4.4", "--methods", *methods))
    rows = rows_of(out)
    assert [row["method"] for row in rows] == methods
    exponents = rows[0]["exponents"].values()
    assert len(exponents) == 2 * 4
    assert set(exponents) <= {i / 10 for i in range(11)}
    assert all(abs(row["kl_uncompressed"]["text.txt"]) < 1e-6 < kl(row) for row in rows)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias"])
@pytest.mark.parametrize("kind", ["rotate", "heads", "scale"])
def test_transforms_leave_the_function_alone(family: str, kind: str, load: Any) -> None:
    transforms, draw = load("transforms"), torch.Generator().manual_seed(0)
    model: Any = families.build(family)
    with torch.no_grad():  # a random model's norms are ones and its biases zeros: nothing to fold
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=draw) + (0.5 if "norm" in name else 0))
    changed = copy.deepcopy(model)
    if kind == "rotate":
        transforms.rotate_residual(changed, draw)
    elif kind == "heads":
        transforms.rotate_heads(changed, draw)
    else:
        transforms.scale(changed, _factors(changed, draw))
    tokens = torch.randint(128, (2, 16), generator=draw)
    with torch.no_grad():
        before, after = model(tokens).logits, changed(tokens).logits
    assert before.std() > 1e-2
    assert torch.allclose(before, after, atol=1e-4)
    moved = {n for n, p in changed.named_parameters() if n in dict(model.named_parameters())
             and not torch.equal(p, model.get_parameter(n))}  # fmt: skip
    assert any("v_proj.weight" in name for name in moved)


def _factors(model: Any, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Random factors; o's are the same for the two heads that read the same values."""
    out = {}
    for i, layer in enumerate(model.model.layers):
        for name, columns in (("self_attn.q_proj", 64), ("mlp.gate_proj", 64), ("mlp.down_proj", 128)):
            out[f"model.layers.{i}.{name}"] = torch.rand(columns, generator=draw) + 0.5
        size = layer.self_attn.head_dim
        shared = torch.rand(model.config.num_key_value_heads, 1, size, generator=draw) + 0.5
        out[f"model.layers.{i}.self_attn.o_proj"] = shared.expand(-1, 2, -1).flatten()
    return out


def test_large(tmp_path: Path, load: Any) -> None:
    out = tmp_path / "large.json"
    small = [
        "--device",
        "cpu",
        "--layers",
        "1",
        "--hidden",
        "256",
        "--samples",
        "1",
        "--length",
        "16",
        "--out",
        str(out),
    ]
    load("large").main([*small, "--verbs", "measure", "plan", "apply"])
    verbs = {verb["verb"]: verb for verb in json.loads(out.read_text(encoding="utf-8"))["verbs"]}
    assert verbs["plan"]["host_imports_bytes"] <= verbs["plan"]["host_peak_bytes"]
    assert verbs["apply"]["logits_finite"]
    assert 4.3 < verbs["apply"]["stored_bits_per_weight"] <= 4.4
    with pytest.raises(SystemExit):
        load("large").main([*small, "--verbs", "apply"])


def test_prices_are_those_of_annotate_salience(load: Any) -> None:
    variants, program = load("variants"), measured.priced()
    whole = variants.price(program, context(measured.MODEL))
    parts = variants.price(program, context(measured.MODEL), by_group=True)
    for site in program.open_sites():
        wanted = program.tensor(site.name, "salience")
        assert torch.allclose(whole.losses[site.name], wanted, rtol=1e-3, atol=1e-7 * float(wanted.max()))
        by_group = parts.losses[site.name]
        by_group = by_group if by_group.dim() == 3 else by_group[:, None]
        assert torch.allclose(by_group.sum(1), wanted, rtol=1e-3, atol=1e-7 * float(wanted.max()))


@pytest.mark.parametrize("budget", [2.9, 4.4, 6.1])
def test_menus_of_the_default_form_are_joint(budget: float, load: Any) -> None:
    variants, program = load("variants"), measured.priced()
    priced = variants.Priced(
        variants.DEFAULT,
        {s.name: program.tensor(s.name, "salience") for s in program.open_sites()},
    )
    menus = variants.menus_of(program, [priced])
    assign = variants.AssignMenus(Budget(budget), (), menus)
    ours = Decisions.read(manager.run(program, (assign,), context(measured.MODEL)))
    wanted = Decisions.read(manager.run(program, (AssignPrecision(Budget(budget)),), context(measured.MODEL)))
    assert ours.loss == pytest.approx(wanted.loss, rel=0.02)
    assert not any(one.rank for one in (*ours.sites.values(), *wanted.sites.values()))


def test_moments_without_correlations_round_to_nearest() -> None:
    """What the row "nearest rounding" stands on."""
    program = measured.priced()
    sigma = {key: torch.diag(t.diagonal()) for key, t in program.tensors.items() if key.endswith("/sigma")}
    quantized = _at(program.with_tensors(sigma), 3)
    for name, sites in inputs(program).items():
        rows = stack(program, name, sites, torch.device("cpu"))
        for site, weight in rows.split(rows.weight):
            widths = torch.full((site.rows,), 3, dtype=torch.uint8)
            grid = fit_mixed(weight, program.tensor(name, "sigma").diagonal(), widths, site.name)
            made = Settled.of(quantized, quantized.site(site.name), torch.device("cpu")).weight()
            assert torch.allclose(made, dequantize(round_nearest(weight, grid), grid))


def _at(program: Program, width: int) -> Program:
    """Every site quantized to one width."""
    fixed = tuple((s.name, width) for s in program.open_sites())
    assign = AssignPrecision(Budget(_bits(program, width)), fixed)
    return manager.run(program, (assign, ReorderFeatures(), QuantizeWeights()), context(measured.MODEL))


def _bits(program: Program, width: int) -> float:
    from mixcomp.budget import row_bits

    scope = [s for s in program.sites if s.in_scope]
    weights = sum(s.rows * s.columns for s in scope)
    return sum(s.rows * row_bits(s.rows, s.columns, width, False) for s in scope) / weights


def test_a_mix_of_rows_is_what_gptq_makes_at_that_mix(load: Any) -> None:
    """What correlation stands on."""
    correlation, program = load("correlation"), measured.priced()
    shop = correlation.Shop.of(program)
    plan = torch.randint(len(WIDTHS), (len(shop.losses),), generator=torch.Generator().manual_seed(0))
    picked = shop.split(plan)
    setting = SimpleNamespace(run=lambda p, *passes: manager.run(p, passes, context(measured.MODEL)))
    copies = [correlation._at_width(setting, program, width) for width in WIDTHS]
    mixed = {n: torch.tensor(WIDTHS, dtype=torch.uint8)[own] for n, own in picked.items()}
    made = correlation._quantized(setting, program, mixed)
    for site in program.open_sites():
        stored = torch.stack([Settled.of(c, c.site(site.name), torch.device("cpu")).weight() for c in copies])
        if made.find(site.name, "column_order") is None:
            wanted = Settled.of(made, made.site(site.name), torch.device("cpu")).weight()
            assert torch.equal(stored[picked[site.name], torch.arange(site.rows)], wanted)


def test_groups_of_columns_are_charged_for_their_own_errors(load: Any) -> None:
    """Without correlations a group's loss is its own: brute force, with groups that are not rounded in their order."""
    draw = torch.Generator().manual_seed(0)
    energy = torch.rand(80, generator=draw) + torch.tensor([1.0, 5.0, 3.0]).repeat_interleave(32)[:80]
    error = torch.randn(7, 80, generator=draw)
    known = feedback(torch.diag(energy), "site")
    assert not torch.equal(known.order, torch.arange(80))
    found = load("variants")._losses(error, known, by_group=True)
    each = error.square() * (energy + known.damping * energy.mean())
    wanted = torch.stack([part.sum(1) for part in each.split(32, 1)], 1)
    assert torch.allclose(found, wanted, rtol=1e-4)
