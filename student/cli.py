"""`student …`: from shards to a trained, measured and serving drafter. This file only wires."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from shared.config import load_config
from shared.console import (
    ConfigArgument,
    LicenseOption,
    LogLevelOption,
    MessageOption,
    PrivateOption,
    RepositoryArgument,
    RevisionOption,
    RuleOption,
    SetOption,
    SplitOption,
    VersionOption,
    application,
    configure_logging,
    run,
    stdout,
)
from shared.errors import ConfigError

app = application("Fine-tune LLaDA into a draft model from a teacher's shards, measure it and decode with it.")


@app.callback()
def student(
    version: VersionOption = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """What holds for all commands."""
    # `deepspeed --module` passes --local_rank to every rank, before the command; the environment has it too.
    del version, local_rank
    logging.getLogger("numba").setLevel(logging.WARNING)  # it narrates at DEBUG


@app.command()
def init(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Make the student that training starts from: layers of a checkpoint or random weights, and a vocabulary."""
    configure_logging(log_level)
    from student.model.initialize import initialize_student

    initialize_student(load_config(config, overrides))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run such as runs/demo, or a model's directory.")],
    to: Annotated[Path | None, typer.Option("--to", help="Where to write; RUN/export by default.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="As trained by default.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    checkpoint: Annotated[int | None, typer.Option(help="Of this step, in place of the trained student.")] = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Write the trained student as a self-contained checkpoint, and prove that it loads."""
    configure_logging(log_level)
    from student.model.export import export_student

    export_student(run_dir, to, dtype, shard_size, checkpoint)


@app.command()
def push(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, which is exported first, or what `student export` wrote.")
    ],
    repository: RepositoryArgument,
    license: LicenseOption = None,
    private: PrivateOption = True,
    revision: RevisionOption = None,
    message: MessageOption = None,
    log_level: LogLevelOption = "info",
) -> None:
    """Publish the trained student on the Hugging Face Hub, with a card of what it is and how it is served."""
    configure_logging(log_level)
    from shared.hub import Repository
    from student.model.push import push_student

    to = Repository(repository, "model", message or "Upload the student", private, revision)
    stdout.print(f"pushed to {push_student(run_dir, to, license)}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of a student, or of a LLaDA checkpoint.")],
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    length: Annotated[int | None, typer.Option(help="Answer tokens.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens that are denoised together.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps in all; the length unmasks one a step.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most probable token.")] = None,
    cfg: Annotated[float | None, typer.Option("--cfg", help="Classifier-free guidance scale; 0 is off.")] = None,
    remasking: Annotated[
        Literal["low_confidence", "random"] | None, typer.Option(help="Which predictions of a step are kept.")
    ] = None,
    attention: Annotated[
        Literal["bidirectional", "draft"] | None, typer.Option(help="LLaDA's own, or with the prefix cache.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt without the chat template.")] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, max=(1 << 63) - 1, help="Of the noise at temperatures above 0; else 0.")
    ] = None,
    with_teacher: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="The config's teacher answers, and what the student drafts is colored."),
    ] = None,
    log_level: LogLevelOption = "warning",
) -> None:
    """Talk to a student with LLaDA's own sampler, or see what it drafts of the teacher's answer."""
    configure_logging(log_level)
    sampling = {
        "block_length": block_length, "steps": steps, "temperature": temperature, "guidance": cfg,
        "remasking": remasking, "attention": attention,
    }  # fmt: skip
    if with_teacher is not None:
        if raw or {*sampling.values(), seed} != {None}:
            raise ConfigError(
                "--with-teacher decodes greedily with the teacher and takes --prompt, --system and --length; leave the "
                "sampler's other options out"
            )
        from student.drafting.show import generate_with_teacher

        generate_with_teacher(load_config(with_teacher), model, prompt, system=system, length=length or 128)
        return
    from student.model.generate import generate as generate_answer

    typer.echo(generate_answer(model, prompt, system=system, raw=raw, seed=seed or 0, length=length, **sampling))


@app.command()
def prepare(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Turn the stored rows into targets over the student's vocabulary, once; a rerun does only what is missing."""
    configure_logging(log_level)
    from student.alignment.prepare import prepare as prepare_targets

    prepare_targets(load_config(config, overrides))


@app.command()
def audit(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Directory or URL of a dataset.")],
    tokenizer: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="The student's tokenizer: directory or file.")],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Records to look at.")] = 200,
    split: SplitOption = None,
    rule: RuleOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """How a dataset's distributions carry over to a tokenizer: overlap, targets, information, side by side."""
    configure_logging(log_level)
    from student.alignment.audit import audit as audit_dataset

    report = audit_dataset(dataset, tokenizer, Console(quiet=True) if as_json else stdout, limit, split, rule)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))


@app.command()
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Ranks; else train.world_size, or the GPUs here.")] = None,
    gpu_gib: Annotated[float | None, typer.Option(min=1, help="Memory of each; else this machine's, or 80.")] = None,
    tflops: Annotated[float, typer.Option(min=1e-3, help="A GPU's peak in bfloat16.")] = 989.0,
    utilization: Annotated[float, typer.Option(min=1e-3, max=1, help="Share of the peak that is reached.")] = 0.4,
    link: Annotated[float, typer.Option(min=1e-3, help="GB/s that a rank sends to the others.")] = 450.0,
    shape: Annotated[
        Path | None, typer.Option(help="YAML file of LladaConfig's fields, for a start unknown here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Memory, traffic, time and disk of a training, by arithmetic; refuses what does not fit. Starts nothing."""
    configure_logging(log_level)
    from student.planning.plan import Assumptions
    from student.planning.plan import plan as plan_training

    planned = plan_training(
        load_config(config, overrides), Assumptions(gpus, gpu_gib, tflops, utilization, link, shape)
    )
    if as_json:
        typer.echo(planned.json())
    else:
        stdout.print(planned.table())
    planned.require_fit()


@app.command()
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_level: LogLevelOption = "info",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget checkpoints and the trained model.")] = False,
) -> None:
    """Train on the prepared targets; alone it starts its own ranks, under `torchrun` or `deepspeed` it is one."""
    configure_logging(log_level)
    from student.training.train import train as train_student

    train_student(load_config(config, overrides), fresh=fresh)


@app.command()
def evaluate(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Acceptance before and after training, from the held-out shards alone."""
    configure_logging(log_level)
    from student.evaluation.evaluate import evaluate as evaluate_student

    evaluate_student(load_config(config, overrides))


@app.command()
def speculate(
    config: ConfigArgument,
    overrides: SetOption = None,
    break_even: Annotated[
        bool, typer.Option("--break-even", help="Measure instead what each acceptance length would be worth.")
    ] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """Decode the held-out prompts in vLLM with the trained student as draft, and without; compare the two."""
    configure_logging(log_level)
    if break_even:
        from student.drafting import break_even as measure

        stdout.print(measure.table(measure.break_even(load_config(config, overrides))))
        return
    from student.drafting.speculate import speculate as speculate_with_student

    speculate_with_student(load_config(config, overrides))


@app.command()
def certify(
    config: ConfigArgument,
    overrides: SetOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="To sample with the draft and without; more find more.")] = 100_000,
    log_level: LogLevelOption = "info",
) -> None:
    """Prove on this machine that drafts change nothing of the teacher's output: one page, passed or failed."""
    configure_logging(log_level)
    from student.drafting.certify import PAGE
    from student.drafting.certify import certify as certify_student

    loaded = load_config(config, overrides)
    certificate = certify_student(loaded, tokens)
    typer.echo((loaded.run_dir / PAGE).read_text(encoding="utf-8"))
    raise typer.Exit(0 if certificate["passed"] else 1)


@app.command(context_settings={"ignore_unknown_options": True})
def serve(
    config: ConfigArgument,
    further: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]", help="For vLLM's server, e.g. --port 8001.")
    ] = None,
    overrides: SetOption = None,
    start: Annotated[bool, typer.Option("--run", help="Start the server; else its command is printed.")] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """The vLLM server of the teacher with the trained student as its drafter."""
    configure_logging(log_level)
    from student.drafting.serve import serve as serve_teacher

    raise typer.Exit(serve_teacher(load_config(config, overrides), further or (), start=start))


@app.command()
def migrate(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="The older pipeline's run_fine_tuning.sh.")],
    further: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARGS]", help="For `shards import-json`, e.g. --temperature 0.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="To change; llama-3.3-70b.yaml, without logits sft.yaml.")
    ] = None,
    overrides: SetOption = None,
    start: Annotated[bool, typer.Option("--run", help="Run the commands; else they are printed.")] = False,
    log_level: LogLevelOption = "info",
) -> None:
    """A config and the commands for the older pipeline's script: import, init, prepare, train, evaluate."""
    configure_logging(log_level)
    from student.migrate import migrate as migrate_script

    raise typer.Exit(migrate_script(script, config, overrides or (), further or (), start=start))


@app.command()
def report(config: ConfigArgument, overrides: SetOption = None, log_level: LogLevelOption = "info") -> None:
    """Gather what the stages measured into report.json, index.html and a short summary."""
    configure_logging(log_level)
    from student.evaluation.report import write_report

    write_report(load_config(config, overrides))


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
