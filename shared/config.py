"""The configuration of the whole pipeline: one YAML file, validated whole by every command.

Every command checks every section, so that a typo under `train:` is found before the teacher has spent an
hour. Models are strict: an unknown key is an error that names the keys that exist. Derived values are
properties, computed after overrides, never stored.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from shared.errors import ConfigError
from shared.records import decoding_rule

Split = Literal["train", "held_out"]
LossName = Literal["auto", "ce", "kl", "hybrid"]

CHANGED_KEYS = {
    "prepare.events": "removed: events are always what `spelled` named; delete this line",
    "prepare.store": "removed: targets are always stored; delete this line",
    "prepare.search_width": "removed with `prepare.events: exact`, the only setting that used it; delete this line",
}
"""Keys of earlier versions, without the numbers of list items: what became of them and what to do."""


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class TeacherConfig(Section):
    """Which model teaches and how vLLM holds it."""

    model: str = Field(
        description="Directory or hub name of the teacher's checkpoint.", examples=["meta-llama/Llama-3.3-70B-Instruct"]
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name; null is its default branch.")
    gguf: str | None = Field(
        None, description="GGUF file, or PACKAGE/FILE inside an installed package; converted once into `model`."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Of the weights and the computation."
    )
    tensor_parallel: PositiveInt = Field(1, description="GPUs that share each layer; within a node.")
    pipeline_parallel: PositiveInt = Field(1, description="Stages of layers, each on its own GPUs; across nodes.")
    max_model_len: PositiveInt = Field(8192, description="Longest prompt and answer together, in the teacher's tokens.")
    max_num_seqs: PositiveInt = Field(256, description="Requests that decode at once.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of each GPU's memory that vLLM takes.")
    kv_cache_gib: PositiveFloat | None = Field(None, description="CPU only: memory for the KV cache, in GiB.")
    enforce_eager: bool = Field(False, description="Skip compilation and CUDA graphs: starts sooner, decodes slower.")
    fp32_head: bool = Field(
        True, description="Compute the output head in float32, so that logprobs are not rounded to bf16."
    )


class DecodingConfig(Section):
    """One decoding rule under which responses are collected. `temperature: 0` is greedy."""

    split: Split = Field(description="Which prompts are answered: train or held_out.", examples=["train"])
    temperature: NonNegativeFloat = Field(1.0, description="0 is greedy, 1 the teacher's own distribution.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps every token.")
    top_k: int = Field(0, ge=0, description="0 keeps every token.")
    max_tokens: PositiveInt = Field(256, description="Longest answer.")
    samples: PositiveInt = Field(1, description="Responses per prompt.")

    @property
    def rule(self) -> str:
        """The rule's name."""
        return decoding_rule(self.temperature, self.top_p, self.top_k)

    @property
    def tag(self) -> str:
        """The rule with its settings, as units and sample ids carry it: `greedy`, `sample`, `t0.7-p0.9-k20`."""
        if self.rule != "filtered":
            return self.rule
        return f"t{self.temperature:g}-p{self.top_p:g}-k{self.top_k}"


class CollectConfig(Section):
    """What is asked of the teacher and what is kept of its answers."""

    prompts: Path = Field(
        description="JSONL, one prompt or conversation a line (`teacher/README.md`).", examples=["data/prompts.jsonl"]
    )
    system_prompt: str | None = Field(
        None, description="Put before conversations that do not begin with a system turn."
    )
    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the prompts that training never sees.")
    top_k: PositiveInt = Field(64, description="Most candidates kept per token.")
    retained_mass: float | None = Field(
        None, gt=0, lt=1, description="Stop a token's candidates where they hold this mass; top_k stays the cap."
    )
    unit_prompts: PositiveInt = Field(64, description="Prompts per unit of work, the unit of resume.")
    decoding: list[DecodingConfig] = Field(
        min_length=1, description="Decoding rules, each for one split.", examples=[[{"split": "train"}]]
    )
    template_arguments: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template; pin what it would take from the clock."
    )
    rendered: bool | None = Field(
        None,
        description="Prompts are rendered text already (true), or people's words, special tokens in them included "
        "(false); null recognizes rendered text by its beginning and refuses what may be either.",
    )
    measure_capture: bool = Field(False, description="Measure first what capturing costs in tokens per second.")
    responses: Path | None = Field(
        None, description="`teacher score` only: JSONL with a `response` per line, or a dataset to score again."
    )
    score_tokens: PositiveInt = Field(
        1024, description="`teacher score` only: tokens per forward, each of which needs a row of the whole vocabulary."
    )

    @model_validator(mode="after")
    def _rules_are_distinct(self) -> CollectConfig:
        seen: set[tuple[str, str]] = set()
        for number, decoding in enumerate(self.decoding):
            if (decoding.split, decoding.tag) in seen:
                raise ValueError(
                    f"decoding[{number}] repeats the rule {decoding.tag} for {decoding.split}; use `samples` for more "
                    "responses per prompt"
                )
            if decoding.rule == "greedy" and decoding.samples > 1:
                raise ValueError(f"decoding[{number}] is greedy: {decoding.samples} samples would be one text")
            seen.add((decoding.split, decoding.tag))
        return self


class StudentTokenizerConfig(Section):
    """The student's vocabulary: its own, trained on the dataset's training text, or an existing one."""

    kind: Literal["trained", "checkpoint", "teacher"] = Field(
        "checkpoint", description="Trained on the dataset's training text, the student checkpoint's, or the teacher's."
    )
    vocab_size: PositiveInt = Field(8192, description="Of a trained tokenizer: its tokens, specials included.")
    individual_digits: bool = Field(False, description="Of a trained tokenizer: every digit is its own token.")
    mask_token: str | None = Field(
        None, description="An unused special token to serve as mask; null appends one where there is none."
    )


class LoraConfig(Section):
    """Low-rank adapters: only they are trained, and they are merged when the student is saved."""

    rank: PositiveInt = Field(16, description="Of each adapter.")
    alpha: PositiveInt = Field(32, description="The adapters are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the adapters' inputs.")
    targets: list[str] = Field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"],
        description="Layers of LLaDA's block, by their own names.",
    )


class StudentConfig(Section):
    """How the student starts. `checkpoint` may be a LLaDA or any LLaMA-architecture checkpoint, or null for random."""

    checkpoint: str | None = Field(
        description="LLaDA or LLaMA-architecture checkpoint to start from; null starts random.",
        examples=["GSAI-ML/LLaDA-8B-Instruct"],
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub name; null is its default branch.")
    layers: list[int] | None = Field(None, description="Layers of the checkpoint to keep, in order; null keeps all.")
    shape: dict[str, Any] | Path = Field(
        default_factory=dict, description="LladaConfig fields for a random start, or a YAML file of them."
    )
    weight_tying: bool | None = Field(
        None, description="false gives a checkpoint that ties its embeddings a head of its own; null keeps what it has."
    )
    tokenizer: StudentTokenizerConfig = Field(StudentTokenizerConfig(), description="The student's vocabulary.")
    lora: LoraConfig | None = Field(None, description="Train adapters only; null trains every weight.")
    max_sequence_length: PositiveInt = Field(4096, description="Longest sequence of the student, in its tokens.")


class PrepareConfig(Section):
    """How stored rows become targets over the student's vocabulary (`student/alignment/README.md`)."""

    min_known_mass: float = Field(
        0.5, ge=0, le=1, description="Below this known conditional mass a position has no soft target."
    )
    changed_text: Literal["drop", "encode"] = Field(
        "encode",
        description="Text that the student's normalizer would change: drop the response, or encode its exact bytes.",
    )
    workers: PositiveInt | None = Field(None, description="Parallel processes; null uses the machine's cores.")


class TrainConfig(Section):
    """The student's training. Rates are per step; a step is `global_batch` sequences over all ranks."""

    loss: LossName = Field(
        "auto", description="ce, kl, hybrid (alpha CE + beta KL), or auto: kl where there are distributions, else ce."
    )
    alpha: NonNegativeFloat = Field(0.5, description="Weight of cross-entropy in `hybrid`.")
    beta: NonNegativeFloat = Field(0.5, description="Weight of KL in `hybrid`.")
    temperature: PositiveFloat = Field(
        1.0, description="Of both distributions in KL; the loss is scaled by its square."
    )
    max_unknown_share: float = Field(
        0.1, ge=0, le=1, description="Refuse a temperature at which more than this share of the mass is unknown."
    )
    tv_weight: NonNegativeFloat = Field(0.0, description="Weight of total variation at depth 1.")
    path_weight: NonNegativeFloat = Field(0.0, description="Weight of the path term -log J.")
    depth_decay: float = Field(1.0, gt=0, le=1, description="Weight of depth d is depth_decay^(d-1).")
    block_length: PositiveInt = Field(8, description="Masked tokens per block: the longest draft, in student tokens.")
    anchors: PositiveInt = Field(8, description="Masked blocks per sequence and forward.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; set this or epochs.")
    epochs: PositiveFloat | None = Field(None, description="Passes over the training samples; set this or steps.")
    global_batch: PositiveInt = Field(32, description="Sequences per step, over all ranks.")
    micro_batch: PositiveInt = Field(8, description="Sequences per forward on one rank.")
    max_length: PositiveInt = Field(
        4096, description="Blocks that would end beyond so many student tokens are left out."
    )
    learning_rate: PositiveFloat = Field(2e-5, description="The peak, after the warm-up; a cosine follows.")
    min_learning_rate: float = Field(0.1, ge=0, le=1, description="Share of the rate that the cosine ends on.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Of AdamW.")
    grad_clip: PositiveFloat = Field(1.0, description="Largest norm of a step's gradient.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="Of the weights in forward and backward; the optimizer keeps float32. auto is bfloat16, but "
        "float32 on a CPU without AVX-512, where products in bfloat16 take 48 times as long.",
    )
    world_size: PositiveInt | None = Field(
        None, description="Ranks that `make train` launches; null uses the GPUs present."
    )
    deepspeed: Path = Field(Path("configs/deepspeed/zero2.json"), description="DeepSpeed's own configuration.")
    activation_checkpointing: bool = Field(
        False, description="Compute activations again in the backward: less memory, a third more time."
    )
    checkpoint_steps: PositiveInt | None = Field(
        None, description="Save every so many steps; null saves at the end only."
    )
    keep_checkpoints: PositiveInt = Field(2, description="Newest checkpoints that are kept.")

    @model_validator(mode="after")
    def _has_an_end(self) -> TrainConfig:
        if self.steps is None and self.epochs is None:
            raise ValueError("set train.steps or train.epochs, otherwise training has no end")
        return self


class EvaluateConfig(Section):
    """Acceptance on held-out text, from the shards alone."""

    rule: Literal["greedy", "sample"] = Field("greedy", description="Decoding rule that the headline tau is for.")
    draft_tokens: PositiveInt = Field(4, description="Teacher tokens drafted per target forward.")
    max_samples: PositiveInt | None = Field(None, description="Held-out responses per decoding rule; null takes all.")
    batch: PositiveInt = Field(16, description="Responses per forward.")


class SpeculateConfig(Section):
    """Real speculative decoding of the held-out prompts, and the same without a draft."""

    draft_tokens: PositiveInt = Field(4, description="Teacher tokens drafted per target forward.")
    max_tokens: PositiveInt = Field(64, description="Longest answer.")
    max_prompts: PositiveInt | None = Field(None, description="Held-out prompts that are decoded; null takes all.")
    max_num_seqs: PositiveInt = Field(8, description="Requests in flight, in both runs.")
    max_context: PositiveInt | None = Field(
        None, description="Longest context that is drafted for, in student tokens; null is the student's limit."
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Teacher's dtype; null takes teacher.dtype."
    )


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


def load_config(path: Path, overrides: list[str] | None = None) -> PipelineConfig:
    """Read `path`, apply `KEY.PATH=VALUE` overrides (values are YAML) and validate the whole.

    Raises:
        ConfigError: if the file is missing or not a YAML mapping, an override is malformed, a key is unknown
            or a value is out of its range; every problem is listed with its key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the config {path}: {error.strerror}; pass a YAML file such as configs/demo.yaml"
        ) from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds {type(tree).__name__}, expected a mapping of sections such as teacher: and train:"
        )
    for override in overrides or []:
        apply_override(tree, override)
    try:
        return PipelineConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path} is not a valid config:\n" + "\n".join(_explain(error))) from error


def dump_config(config: PipelineConfig) -> str:
    """The resolved config as YAML, to be written beside every output."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply_override(tree: dict[str, Any], override: str, option: str = "--set", example: str = "train.loss=kl") -> None:
    """Put the value of `KEY.PATH=VALUE` into `tree`; `option` and its `example` are for messages.

    Raises:
        ConfigError: if it is malformed.
    """
    key, separator, value = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(f"{option} {override!r} is not KEY.PATH=VALUE, for example {option} {example}")
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{option} {override!r}: {part!r} is a value ({child!r}), not a section that can hold {parts[-1]!r}"
            )
        node = child
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {override!r}: the value is not valid YAML: {error}") from error


def _explain(error: ValidationError) -> list[str]:
    """One line a problem: the key, the value seen and what was expected. For an unknown key: what became of it, if an
    earlier version had it, or a near miss."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        named = ".".join(part for part in problem["loc"] if isinstance(part, str))
        if problem["type"] == "extra_forbidden" and named in CHANGED_KEYS:
            lines.append(f"  {key}: {CHANGED_KEYS[named]}")
        elif problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1])
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"  {key}: unknown key; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"  {key}: missing; this key is required")
        else:
            lines.append(f"  {key}: {problem['msg']} (got {problem['input']!r})" if key else f"  {problem['msg']}")
    return lines


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = PipelineConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        nested = [
            a
            for a in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
