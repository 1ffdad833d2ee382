"""The configuration of the whole pipeline: one YAML file, validated whole by every command.

Every command checks every section, so that a typo under `train:` is found before the teacher has spent an hour. Models
are strict: an unknown key is an error that names the keys that exist. Derived values are properties, computed after
overrides, never stored.
"""

from shared.config.collect import CollectConfig, DecodingConfig, SourceConfig, Split, WritePromptsConfig
from shared.config.load import apply_override, dump_config, load_config
from shared.config.pipeline import PipelineConfig
from shared.config.prepare import PrepareConfig
from shared.config.section import Section
from shared.config.student import LoraConfig, StudentConfig
from shared.config.teacher import ServiceConfig, TeacherConfig
from shared.config.train import ObjectivesConfig, RandomMaskingConfig, TrainConfig

__all__ = [
    "CollectConfig",
    "DecodingConfig",
    "LoraConfig",
    "ObjectivesConfig",
    "PipelineConfig",
    "PrepareConfig",
    "RandomMaskingConfig",
    "Section",
    "ServiceConfig",
    "SourceConfig",
    "Split",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "WritePromptsConfig",
    "apply_override",
    "dump_config",
    "load_config",
]
