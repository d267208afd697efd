"""Forged folders, right digests and wrong meaning, are refused by what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from artifacts import DROP, PLAN, SHARD, compiled, forge, form, new, put, refused, reseal
from mixcomp import records, shards
from mixcomp.artifact import load
from mixcomp.errors import ArtifactError, ConfigError, FormatError
from mixcomp.format import Scales, Segment, SiteFormat
from mixcomp.manifest import MANIFEST, Manifest
from mixcomp.plans import Compiled
from mixcomp.report import describe

pytest_plugins = ["artifacts"]

SITE = "model.layers.0.self_attn.q_proj"
TENSOR = ("files", SHARD, "tensors", "model.embed_tokens.weight")


def repeat(data: dict[str, Any]) -> None:
    """List a tensor in a second file, which grows by it."""
    other = data["files"]["mixcomp-00002.safetensors"]
    other["tensors"][TENSOR[-1]] = data["files"][SHARD]["tensors"][TENSOR[-1]]
    listed = {
        name: shards.StoredTensor(shards.DTYPES[t["dtype"]], tuple(t["shape"])) for name, t in other["tensors"].items()
    }
    other["size"] = shards.file_size(listed)


FORGERIES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put("format_version", 2), r"format version 2, this release reads version 1.*mixcomp '\d+\.\d+"),
    (put("format_version", 0), "format_version"),
    (put("format_version", "1"), "format_version"),
    (put("format_version", DROP), "format_version"),
    (put("surprise", 1), "surprise"),
    (put("ties", DROP), "ties"),
    (put("ties", []), "ties"),
    (put("versions", "torch", 5), "versions.torch"),
    (put("architecture", "os.system"), "architecture"),
    (put("architecture", "NoSuchModel"), "NoSuchModel"),
    (put("architecture", "GPT2LMHeadModel"), "GPT2LMHeadModel"),
    (put("architecture", "PreTrainedModel"), "PreTrainedModel"),
    (put("attention", "evil/kernel"), "attention"),
    (put("bits", "stored", 1), "bits"),
    (put("bits", "extra", 1), "bits"),
    (put("buffers", ["nowhere"]), "buffers"),
    (put("buffers", [3]), "buffers"),
    (put("ties", "lm_head.weight", "nowhere"), "ties.lm_head.weight"),
    (put("ties", "lm_head.weight", 3), "ties"),
    (put("ties", "model.norm.weight", "model.embed_tokens.weight"), "ties.model.norm.weight"),
    (put("ties", "extra.weight", "model.embed_tokens.weight"), "extra.weight"),
    (put("ties", {}), "lm_head.weight"),
    (put("files", "../config.json", {"size": 1, "sha256": "0" * 64}), r"\.\./config\.json"),
    (put("files", "/etc/passwd", {"size": 1, "sha256": "0" * 64}), "/etc/passwd"),
    (put("files", "a\\b", {"size": 1, "sha256": "0" * 64}), "plain name"),
    (put("files", "nul\0", {"size": 1, "sha256": "0" * 64}), "plain name"),
    (put("files", ".hidden", {"size": 1, "sha256": "0" * 64}), "plain name"),
    (put("files", "Config.json", {"size": 1, "sha256": "0" * 64}), "case"),
    (put("files", "mixcomp.json", {"size": 1, "sha256": "0" * 64}), "files"),
    (put("files", "config.json", DROP), "config.json"),
    (put("files", "config.json", "size", -1), "config.json"),
    (put("files", "config.json", "size", True), "config.json"),
    (put("files", "config.json", "size", 10**30), "config.json"),
    (put("files", "config.json", "sha256", "0" * 64), "config.json"),
    (put("files", "config.json", "sha256", "zz"), "config.json"),
    (put("files", "config.json", "tensors", {}), "config.json"),
    (put("files", SHARD, "tensors", {}), SHARD),
    (put("files", SHARD, "size", 3), SHARD),
    (put(*TENSOR, "dtype", "F32 "), "model.embed_tokens.weight"),
    (put(*TENSOR, "dtype", "I32"), SHARD),
    (put(*TENSOR, "shape", [-64, -64]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [2**63, 2**63]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [0, 2**63]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [64] * 9), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [True, 4096]), "model.embed_tokens.weight"),
    (put(*TENSOR, "shape", [32, 128]), SHARD),
    (put(*TENSOR, "sha256", "0" * 64), SHARD),
    (repeat, "model.embed_tokens.weight.*one file only"),
    (put(*TENSOR, "sha256", "0"), "model.embed_tokens.weight"),
    (put("files", SHARD, "tensors", "n" * 1025, {}), "'tensors' is 'nnn.*1024 characters"),
    (put("sites", SITE, "format", "segments", [[64, 7]]), rf"{SITE}.*7"),
    (put("sites", SITE, "format", "segments", [[0, 4], [64, 4]]), SITE),
    (put("sites", SITE, "format", "segments", [[65, 4]]), SITE),
    (put("sites", SITE, "format", "rows", 10**18), SITE),
    (put("sites", SITE, "format", "rank", 65), SITE),
    (put("sites", SITE, "format", "rank", 0), SITE),
    (put("sites", SITE, "format", "scatter", 1), SITE),
    (put("sites", SITE, "format", "scatter", False), SITE),
    (put("sites", SITE, "format", "columns", 32), SITE),
    (put("sites", SITE, "format", "group", 32), SITE),
    (put("sites", SITE, "bias", "F32"), SITE),
    (put("sites", SITE, "bias", "I32"), SITE),
    (put("sites", SITE, "dtype", "U8"), SITE),
    (put("sites", SITE, "kernel", "x"), SITE),
    (put("sites", SITE, DROP), "bits"),
    (
        put(
            "sites",
            "model.norm",
            {"format": SiteFormat(1, 1, (Segment(1, 4),)).to_json(), "dtype": "F32", "bias": None},
        ),
        "model.norm",
    ),
    (put("sites", "", {"format": SiteFormat(1, 1, (Segment(1, 4),)).to_json(), "dtype": "F32", "bias": None}), "sites"),
]


@pytest.mark.parametrize(("change", "names"), FORGERIES, ids=range(len(FORGERIES)))
def test_forged_manifests_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], names: str) -> None:
    forge(folder, change)
    refused(folder, names, (load,))


def test_the_forger_forges(folder: Path) -> None:
    """An unchanged manifest survives the forger, so the refusals above are not about its digest."""
    before = (folder / MANIFEST).read_bytes()
    forge(folder, lambda data: None)
    assert (folder / MANIFEST).read_bytes() == before
    load(folder)


def edit(folder: Path, name: str, **fields: Any) -> None:
    reseal(folder, name, json.dumps(json.loads((folder / name).read_text()) | fields).encode())


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"text_config": {"deep": [{"auto_map": {}}]}}, "auto_map"),
        ({"attn_implementation": "evil/kernel"}, "attn_implementation"),
        ({"_attn_implementation": "evil/kernel"}, "_attn_implementation"),
    ],
)
def test_configs_that_ask_for_code_are_refused(folder: Path, fields: dict[str, Any], names: str) -> None:
    edit(folder, "config.json", **fields)
    refused(folder, f"config.json.*{names}")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": None}, "model type None"),
        ({"model_type": "gpt2"}, "LlamaForCausalLM"),
        ({"hidden_size": 128}, "config.json"),
        ({"hidden_size": -64}, "config.json"),
        ({"hidden_size": "64"}, "config.json"),
        ({"intermediate_size": 10**12}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"intermediate_size": 96}, "stored as 64 x 80"),
        ({"num_hidden_layers": 1}, r"layers\.1\..*no linear there"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 10**9}, "more than"),
        ({"vocab_size": 65}, "model.embed_tokens.weight"),
        ({"hidden_act": "no-such-act"}, "config.json"),
    ],
)
def test_configs_of_other_models_are_refused(folder: Path, fields: dict[str, Any], names: str) -> None:
    edit(folder, "config.json", **fields)
    refused(folder, names, (load,))


def forge_tensor(folder: Path, key: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a stored tensor and make every digest right again."""
    found = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    name = next(n for n, file in found.files.items() if key in file.tensors)
    listed = found.files[name]
    with (folder / name).open("rb", buffering=0) as file:
        tensors = dict(shards.read(file, name, listed.tensors, listed.size))
    change(tensors[key])
    (folder / name).unlink()
    new_file = shards.write_shard(folder / name, tensors)
    forge(folder, put("files", name, new_file.to_json()))


@pytest.mark.parametrize(
    ("tensor", "change", "names"),
    [
        ("factors", lambda t: t.fill_(torch.inf), "factors"),
        ("factors", lambda t: t[5:6].fill_(torch.nan), "factors"),
        ("row_index", lambda t: t[:1].copy_(t[1:2]), "permutation"),
        ("row_index", lambda t: t.neg_(), "permutation"),
        ("branch_scale", lambda t: t.fill_(torch.nan), "scales"),
    ],
)
def test_stored_values_without_meaning_are_refused(
    folder: Path, tensor: str, change: Callable[[torch.Tensor], None], names: str
) -> None:
    forge_tensor(folder, f"{SITE}.{tensor}", change)
    refused(folder, f"{SITE}.*{names}")


@pytest.mark.parametrize(
    ("tensor", "change", "names"),
    [
        ("group_index", lambda t: t[0].zero_(), "group index 0 is not a permutation"),
        ("group_index", lambda t: t[0].copy_(t[0].flip(0)), "groups|zeros|short last group"),
        ("zeros", lambda t: t.fill_(255), "zeros exceed"),
        ("offsets", lambda t: t.fill_(torch.inf), "offsets"),
        ("factors", lambda t: t[3].fill_(torch.nan), "factors"),
    ],
)
def test_stored_values_of_other_forms_are_judged_too(
    shelf: Path, tmp_path: Path, tensor: str, change: Callable[[torch.Tensor], None], names: str
) -> None:
    folder = Path(shutil.copytree(shelf / "llama-forms", tmp_path / "out"))
    found = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    site = next(n for n, s in found.sites.items() if s.fmt.scales is Scales.FLOAT_GROUP and s.fmt.group == 32)
    forge_tensor(folder, f"{site}.{tensor}", change)
    refused(folder, f"{site}.*({names})")


def test_only_other_forms_say_what_they_are(shelf: Path) -> None:
    """Folders of today's format are spelled as they always were."""
    for name in ("llama", "llama-forms"):
        data = json.loads((shelf / name / MANIFEST).read_text())
        keys = {key for site in data["sites"].values() for key in site["format"]}
        assert data["format_version"] == 1
        assert keys - {"rows", "columns", "segments", "scatter", "rank"} == (
            set() if name == "llama" else {"group", "scales"}
        )


def test_a_report_tells_mixed_rows_from_others() -> None:
    model = compiled(new("llama"), pack=form)
    model.mixcomp = Compiled(replace(PLAN, totals={"weights": 1, "payload_bits": 1, "stored_bits": 1}))
    report = describe(model)
    widths = [tuple(site.widths) for site in report.sites]
    assert {("1+4", "2+4", "8"), ("1", "4", "8")} <= set(widths)
    assert sum(report.rows_by_width().values()) == sum(site.rows for site in report.sites)
    assert {path for site in report.sites for path in site.paths.values()} == {"reference"}
    assert report.sites[0].stored_bits == model.get_submodule(report.sites[0].name).fmt.stored_bits()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (b"", "not JSON"),
        (b'{"format_version": 1, "format_version": 1}', "twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        (b'{"format_version": NaN}', "NaN"),
        (b'{"format_version": -Infinity}', "Infinity"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' + nested(40) + b"}", "deep"),
        (b'{"a": ' + nested(100_000) + b"}", "not JSON|deep"),
        (b"[" + b"0," * ((1 << 22) + 1) + b"0]", "entries"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not JSON"),
        (b"{'a': 1}", "not JSON"),
    ],
    ids=range(12),
)
def test_hostile_json_is_refused(folder: Path, raw: bytes, names: str) -> None:
    (folder / MANIFEST).write_bytes(raw)
    refused(folder, rf"mixcomp\.json.*({names})")
    with pytest.raises(ArtifactError, match=rf"config\.json.*({names})"):
        records.read_json(raw, "config.json")


@pytest.mark.parametrize("raw", [b"null", b"[]", b"3", b'"x"'])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST).write_bytes(raw)
    refused(folder, r"mixcomp\.json.*the whole.*an object")


def test_a_manifest_in_another_spelling_is_refused(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    refused(folder, "digest does not match")


def test_a_manifest_too_large_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # a hole: no disk is used
    refused(folder, r"mixcomp\.json: 1099511627776 bytes")


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta", 3.5])
def test_devices_that_cannot_be_used_are_refused(shelf: Path, device: Any) -> None:
    with pytest.raises(ConfigError, match=f"device {device!r}"):
        load(shelf / "llama", device=device)


def test_formats_are_format_errors(folder: Path) -> None:
    forge(folder, put("sites", SITE, "format", "segments", [[64, 7]]))
    with pytest.raises(FormatError):
        load(folder)
