"""The whole file: all sections, and the places of a run's outputs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.config.collect import CollectConfig
from shared.config.evaluate import EvaluateConfig
from shared.config.prepare import PrepareConfig
from shared.config.section import Section
from shared.config.speculate import SpeculateConfig
from shared.config.student import StudentConfig
from shared.config.teacher import TeacherConfig
from shared.config.train import TrainConfig


class PipelineConfig(Section):
    """The whole file."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="The run: everything of it lies in RUNS/NAME.",
        examples=["my-run"],
    )
    runs: Path = Field(Path("runs"), description="Directory of all runs.")
    seed: int = Field(0, ge=0, lt=1 << 63, description="Of sampling, order of data, masks and random starts.")
    teacher: TeacherConfig
    collect: CollectConfig
    student: StudentConfig
    prepare: PrepareConfig = PrepareConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    speculate: SpeculateConfig = SpeculateConfig()

    @property
    def run_dir(self) -> Path:
        return self.runs / self.name

    @property
    def shards_dir(self) -> Path:
        return self.run_dir / "shards"

    @property
    def student_init_dir(self) -> Path:
        return self.run_dir / "student" / "init"

    @property
    def prepared_dir(self) -> Path:
        return self.run_dir / "prepared"

    @property
    def checkpoints_dir(self) -> Path:
        return self.run_dir / "student" / "checkpoints"

    @property
    def student_final_dir(self) -> Path:
        return self.run_dir / "student" / "final"

    @property
    def report_dir(self) -> Path:
        return self.run_dir / "report"
