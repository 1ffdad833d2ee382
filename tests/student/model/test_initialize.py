import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.config import LoraConfig, PipelineConfig, load_config
from shared.errors import CheckpointError, ConfigError, DatasetError
from shared.tokenizer.vocabulary import Vocabulary
from student.model.configuration_llada import LladaConfig
from student.model.export import load_student, save_student
from student.model.initialize import initialize_student, training_texts
from student.model.lora import add_lora
from student.model.modeling_llada import LladaForMaskedDiffusion
from student.model.sequential_head import settle_sequential_head
from student.model.source import Source, config_of_checkpoint
from student.model.tokenizer import train_tokenizer
from tests.fixtures.conversations import conversations, teacher_tokenizer, write_conversations
from tests.fixtures.tiny_model import causal_layout, with_sequential_head

TEXTS = [text for pair in conversations(100) for text in pair]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA checkpoint of five layers with tied embeddings and the teacher's tokenizer."""
    directory = teacher_tokenizer(tmp_path_factory.mktemp("llama"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=420, hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaDA checkpoint as upstream ships it: more rows than tokens, and a mask that is not registered."""
    directory = tmp_path_factory.mktemp("llada")
    tokenizer = train_tokenizer(TEXTS, 400)
    torch.manual_seed(1)
    roles = {"mask_token_id": 399, "bos_token_id": 394, "eos_token_id": 395, "pad_token_id": 395}
    config = LladaConfig(d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64, vocab_size=448, **roles)
    save_student(LladaForMaskedDiffusion(config), tokenizer, directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["mask_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    directory = tmp_path_factory.mktemp("data") / "shards"
    write_conversations(directory, llama)
    return directory


@pytest.fixture
def configured(tmp_path: Path, shards: Path) -> Any:
    """A config with given `student` settings, whose run has the dataset."""

    def make(dataset: bool = True, **student: Any) -> PipelineConfig:
        tree = {
            "name": "run",
            "runs": str(tmp_path / "runs"),
            "teacher": {"model": "none"},
            "collect": {"prompts": "none", "decoding": [{"split": "train"}]},
            "student": {"max_sequence_tokens": 256, **student},
            "train": {"steps": 1},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        config = load_config(path)
        if dataset and not config.shards_dir.exists():
            config.run_dir.mkdir(parents=True)
            config.shards_dir.symlink_to(shards)
        return config

    return make


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "initialization.json").read_text())


def test_llama_layers_with_a_trained_vocabulary(configured: Any, llama: Path) -> None:
    """The demo's way: chosen layers word for word, the embedding transplanted, ids by role."""
    config = configured(checkpoint=str(llama), layers=[0, 3, 4], tokenizer={"kind": "trained", "vocab_size": 420})
    directory = initialize_student(config)
    model, tokenizer = load_student(directory)
    assert directory == config.student_init_dir
    assert (model.config.n_layers, model.config.vocab_size, len(tokenizer)) == (3, 420, 420)
    assert model.config.weight_tying
    assert model.config.max_sequence_length == tokenizer.model_max_length == 256
    theirs = LlamaForCausalLM.from_pretrained(llama)
    for ours, original in enumerate([0, 3, 4]):
        block, layer = model.model.transformer["blocks"][ours], theirs.model.layers[original]
        assert torch.equal(block.ff_out.weight, layer.mlp.down_proj.weight)
        assert torch.equal(block.attn_out.weight, layer.self_attn.o_proj.weight)
    old, new = Vocabulary.from_tokenizer(llama), Vocabulary.from_tokenizer(directory)
    rows, old_rows = model.head_weight, theirs.get_input_embeddings().weight
    for token in (b" the", b"a", b"\xff"):
        assert torch.equal(rows[new.ids[token]], old_rows[old.ids[token]])
    report = summary(directory)
    assert model.config.mask_token_id == tokenizer.mask_token_id == new.roles["mask"]
    assert model.config.pad_token_id == new.roles["end_of_text"]
    assert report["transplant"]["copied_share"] > 0.5
    assert report["transplant"]["copied"] + report["transplant"]["composed"] > 400
    assert report["parameters"] == model.num_parameters()
    assert (directory / "resolved_config.yaml").exists()


def test_all_llama_layers_with_their_own_vocabulary_are_that_llama(configured: Any, llama: Path) -> None:
    model, tokenizer = load_student(initialize_student(configured(checkpoint=str(llama), dataset=False)))
    theirs = LlamaForCausalLM.from_pretrained(llama).eval()
    ids = torch.randint(0, 400, (2, 30))
    logits = model.eval()(ids, layout=causal_layout(ids)).logits
    assert torch.equal(logits[..., :420], theirs(ids).logits)
    assert tokenizer.mask_token is not None


def test_a_tied_checkpoint_can_be_given_a_head_of_its_own(configured: Any, llama: Path) -> None:
    model, _ = load_student(initialize_student(configured(checkpoint=str(llama), weight_tying=False, dataset=False)))
    assert "model.transformer.ff_out.weight" in model.state_dict()
    assert torch.equal(model.head_weight, model.get_input_embeddings().weight)
    assert model.head_weight is not model.get_input_embeddings().weight


def test_a_llada_checkpoint_is_taken_as_it_is(configured: Any, llada: Path) -> None:
    """Its vocabulary has fewer tokens than the model has rows, and no registered mask."""
    assert AutoTokenizer.from_pretrained(llada).mask_token is None
    model, tokenizer = load_student(initialize_student(configured(checkpoint=str(llada), dataset=False)))
    original, _ = load_student(llada)
    assert model.config.vocab_size == 448
    assert tokenizer.mask_token_id == 399
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_start_from_a_student_keeps_its_sequential_head(configured: Any, llada: Path, tmp_path: Path) -> None:
    """Which training goes on with, adapters or not, where it is to have one of that rank."""
    model, tokenizer = load_student(llada)
    save_student(with_sequential_head(model), tokenizer, tmp_path / "student")
    student, _ = load_student(initialize_student(configured(checkpoint=str(tmp_path / "student"), dataset=False)))
    expected = model.sequential_head.state_dict()
    add_lora(student, LoraConfig())
    settle_sequential_head(student, 8)
    assert all(torch.equal(student.sequential_head.get_parameter(name), value) for name, value in expected.items())
    assert all(parameter.requires_grad for parameter in student.sequential_head.parameters())
    settle_sequential_head(student, 4)
    assert student.sequential_head.state.out_features == 4
    settle_sequential_head(student, None)
    assert student.sequential_head is None


def test_a_start_with_an_adapter_beside_its_weights_is_refused(configured: Any, llada: Path, tmp_path: Path) -> None:
    shutil.copytree(llada, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has an adapter_config.json beside its weights; merge the adapter"):
        initialize_student(configured(checkpoint=str(tmp_path / "adapted"), dataset=False))


def test_a_llada_student_takes_the_teacher_s_vocabulary(configured: Any, llada: Path, llama: Path) -> None:
    directory = initialize_student(configured(checkpoint=str(llada), tokenizer={"kind": "teacher"}))
    model, _ = load_student(directory)
    teacher, student = Vocabulary.from_tokenizer(llama), Vocabulary.from_tokenizer(directory)
    assert student.tokens == teacher.tokens
    old, (original, _) = Vocabulary.from_tokenizer(llada), load_student(llada)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        made, rows = getattr(model, name)().weight, getattr(original, name)().weight
        assert torch.equal(made[student.ids[b" the"]], rows[old.ids[b" the"]])
    assert summary(directory)["transplant"]["composed"] > 0


def test_a_given_token_serves_as_mask_where_the_vocabulary_must_not_grow(configured: Any, llama: Path) -> None:
    tokenizer = {"kind": "checkpoint", "mask_token": "<|mdm_mask|>"}
    model, _ = load_student(initialize_student(configured(checkpoint=str(llama), tokenizer=tokenizer)))
    assert model.config.vocab_size == 420
    assert model.config.mask_token_id == Vocabulary.from_tokenizer(llama).roles["mask"]


def test_random_weights_depend_on_the_seed_alone(configured: Any) -> None:
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48}
    config = configured(checkpoint=None, shape=shape, tokenizer={"kind": "trained", "vocab_size": 300})
    first = load_student(initialize_student(config))[0].state_dict()
    shutil.rmtree(config.student_init_dir)
    second = load_student(initialize_student(config))[0].state_dict()
    other = load_student(initialize_student(config.model_copy(update={"seed": 1})))[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.transformer.wte.weight"], other["model.transformer.wte.weight"])
    assert first["model.transformer.wte.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_the_shape_may_be_a_file(configured: Any, tmp_path: Path) -> None:
    path = tmp_path / "shape.yaml"
    path.write_text(yaml.safe_dump({"d_model": 32, "n_layers": 1, "n_heads": 4, "mlp_hidden_size": 48}))
    config = configured(checkpoint=None, shape=str(path), tokenizer={"kind": "trained", "vocab_size": 300})
    assert load_student(initialize_student(config))[0].config.n_layers == 1


def test_the_student_s_vocabulary_never_sees_held_out_text(configured: Any) -> None:
    texts = list(training_texts(configured(checkpoint=None)))
    assert len(texts) == 80
    assert not any("zeppelin" in text for text in texts)


@pytest.mark.parametrize(
    ("student", "error", "message"),
    [
        ({"layers": [0, 5]}, ConfigError, "expected layers of .* from 0 to 4, at least one; there is no layer 5"),
        ({"layers": []}, ConfigError, "at least one"),
        ({"checkpoint": None}, ConfigError, "student.tokenizer.kind is 'checkpoint' but student.checkpoint is null"),
        ({"checkpoint": "no/such/place"}, CheckpointError, "there is no checkpoint directory no/such/place"),
        ({"max_sequence_tokens": 1024}, ConfigError, "max_sequence_tokens is 1024, but the checkpoint's positions end"),
        ({"tokenizer": {"kind": "trained"}, "dataset": False}, DatasetError, "shards"),
        ({"tokenizer": {"kind": "checkpoint", "mask_token": "<no>"}}, ConfigError, "'<no>' is not a token of"),
        (
            {"checkpoint": None, "shape": {"depth": 3}, "tokenizer": {"kind": "trained"}},
            ConfigError,
            "student.shape.depth is not a field of LladaConfig",
        ),
    ],
)
def test_a_mistake_is_explained_and_leaves_nothing_behind(
    configured: Any, llama: Path, student: dict, error: type[Exception], message: str
) -> None:
    config = configured(**({"checkpoint": str(llama)} | student))
    with pytest.raises(error, match=message):
        initialize_student(config)
    assert not config.student_init_dir.parent.exists()


def test_what_a_llama_config_leaves_out_has_its_default(tmp_path: Path, llama: Path) -> None:
    tree = json.loads((llama / "config.json").read_text())
    del tree["max_position_embeddings"], tree["rms_norm_eps"], tree["rope_parameters"], tree["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    family, config = config_of_checkpoint(tmp_path)
    assert family == "llama"
    assert (config.max_sequence_length, config.rms_norm_eps, config.rope_theta) == (2048, 1e-6, 1e4)
    assert config.n_kv_heads == config.n_heads == 6


def test_another_architecture_is_refused(tmp_path: Path, llama: Path) -> None:
    tree = json.loads((llama / "config.json").read_text())
    for change, message in (
        ({"model_type": "qwen3"}, "is a 'qwen3' model"),
        ({"attention_bias": True}, "attention_bias is True, LLaDA's block needs False"),
        ({"head_dim": 16}, "head_dim 16 x 6 heads is not hidden_size 48"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": "wide"}, "(?s)is no config of a LLaMA model: .*'hidden_size' expected int"),
        ({"num_attention_heads": 0}, "is no config of a LLaMA model"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 1e4}}, "rope_frequency_scaling is"),
        ({"num_hidden_layers": 6}, "missing: model.transformer.blocks.5.attn_norm.weight"),
        ({"num_hidden_layers": 4}, "extra: model.layers.4"),
        (
            {"intermediate_size": 81},
            r"shape of model.transformer.blocks.0.ff_proj.weight: \[80, 48\], expected \[81, 48\]",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(tree | change))
        if not (tmp_path / "model.safetensors").exists():
            (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            Source.open(str(tmp_path))
