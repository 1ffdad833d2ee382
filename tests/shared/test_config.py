"""A config is checked whole: each mistake is named with its key, the value seen and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shared.config import DecodingConfig, PipelineConfig, Section, dump_config, load_config
from shared.config.reference import reference
from shared.config.section import section_of
from shared.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "demo.yaml"


def test_the_demo_config_loads_and_its_dump_loads_again(tmp_path: Path) -> None:
    config = load_config(DEMO)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert config.shards_dir == config.runs / config.name / "shards"


def test_overrides_are_yaml_values_at_dotted_keys() -> None:
    config = load_config(DEMO, ["train.loss=kl", "collect.top_k=7", "student.layers=[0, 2]", "name=other"])
    assert (config.train.loss, config.collect.top_k, config.student.layers) == ("kl", 7, [0, 2])
    assert config.run_dir == config.runs / "other"


MISTAKES = {
    "train.los=kl": r"train\.los: unknown key; did you mean 'loss'\?",
    "train.qqqqq=1": r"train\.qqqqq: unknown key; known keys: loss, alpha",
    "prepare.events=exact": r"prepare\.events: removed: events are always what `spelled` named; delete this line",
    "prepare.search_width=30": r"prepare\.search_width: removed with `prepare\.events: exact`.*; delete this line",
    "speculate.drafter.lookup=false": r"speculate\.drafter\.lookup: now `speculate\.lookup`",
    "speculate.drafter.denoising_order=right": r"speculate\.drafter\.denoising_order: .*\(got 'right'\)",
    "train.loss=mse": r"train\.loss: .*'auto', 'ce', 'kl' or 'hybrid' \(got 'mse'\)",
    "collect.top_k=0": r"collect\.top_k: .*greater than 0 \(got 0\)",
    "name=../x": r"name: .*pattern.*\(got '\.\./x'\)",
    "train": r"--set 'train' is not KEY.PATH=VALUE",
    "train.loss.x=1": r"'loss' is a value \('[a-z]+'\), not a section",
    "train.steps=[": r"the value is not valid YAML",
    "collect.template_arguments.date_string=2024-13-45": r"the value is not valid YAML: month must be in 1\.\.12",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_value(override: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[override]):
        load_config(DEMO, [override])


@pytest.mark.parametrize(
    "override",
    [
        'teacher.service={urls: "http://user:KEY@host"}',
        "teacher.service=http://user:KEY@host",
        "teacher.service={urls: ['ftp://a', 'http://user:KEY@host']}",
        "teacher.service={urls: ['http:/user:KEY@host']}",
        "teacher.service={urls: ['http://host?key=KEY']}",
        'teacher.engine_args="--api-key KEY"',
        "teacher.engine_args={api-key: KEY}",
    ],
)
def test_a_value_that_may_hold_a_secret_is_not_repeated(override: str) -> None:
    with pytest.raises(ConfigError, match=r"  teacher\.(service|engine_args)") as refused:
        load_config(DEMO, [override])
    assert "KEY" not in str(refused.value).replace("VLLM_API_KEY", "")


def test_files_that_are_no_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    for text, message in (
        ("a: [", "not valid YAML"),
        ("[1]", "holds list, expected a mapping"),
        ("", "holds NoneType"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match=r"x\.yaml is not UTF-8 text at byte 9: .*; save it as UTF-8"):
        load_config(tmp_path / "x.yaml")


def test_training_has_one_end() -> None:
    both = r"train.steps is 450 and train.epochs is 5.0, expected one of them: .* train.steps=null .* train.epochs=null"
    with pytest.raises(ConfigError, match=both):
        load_config(DEMO, ["train.steps=450", "train.epochs=5"])
    assert load_config(DEMO, ["train.epochs=5", "train.steps=null"]).train.epochs == 5


def test_training_needs_an_end(tmp_path: Path) -> None:
    tree = yaml.safe_load(DEMO.read_text())
    tree["train"].pop("steps", None)
    tree["train"].pop("epochs", None)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"set train.steps or train.epochs, otherwise training has no end"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 1}, "sample"),
        ({"temperature": 1, "top_p": 0.9}, "filtered"),
        ({"temperature": 0.7}, "filtered"),
    ],
)
def test_a_decoding_rule_has_its_name(settings: dict[str, float], rule: str) -> None:
    assert DecodingConfig.model_validate({"split": "train", **settings}).rule == rule


def test_the_reference_names_every_key_with_its_meaning_and_is_itself_a_config() -> None:
    path = CONFIGS / "reference.yaml"
    assert path.read_text(encoding="utf-8") == reference(), "python -m shared.config.reference > configs/reference.yaml"
    load_config(path, ["train.steps=1"])

    def meanings(model: type[Section]) -> list[str | None]:
        fields = model.model_fields.values()
        sections = [s for s in map(section_of, (f.annotation for f in fields)) if s is not None]
        own = [f.description for f in fields if section_of(f.annotation) is None]
        return own + [text for section in sections for text in (section.__doc__, *meanings(section))]

    assert all(meanings(PipelineConfig))
