"""Training under every ZeRO stage, in two ranks: the same losses, the same average, the same steps skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml

from shared.config import load_config
from student.alignment.prepare import prepare
from student.model.initialize import initialize_student
from tests.fixtures.ranks import run_ranks
from tests.fixtures.toy_run import toy_config, write_toy_shards

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("warm_training")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[Any, Any]]]:
    """What each rank found in a suite of `zero_worker`."""
    directory = tmp_path_factory.mktemp("zero")
    path = toy_config(directory)
    tree = yaml.safe_load(path.read_text())
    tree["student"]["shape"]["weight_tying"] = True  # the embedding, which ZeRO-3 gathers twice
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    write_toy_shards(config)
    initialize_student(config)
    prepare(config)

    def run(suite: str) -> list[dict[Any, Any]]:
        output = directory / suite
        # Compiling Muon's products takes longer than the toy's training.
        run_ranks(
            "tests.student.training.zero_worker",
            [str(path), str(output), suite],
            2,
            output,
            timeout_s=1200,
            TORCHDYNAMO_DISABLE="1",
        )
        return [torch.load(f"{output}.{rank}", weights_only=False) for rank in range(2)]

    return run


def test_the_losses_are_those_without_zero(trained: Callable[[str], list[dict[Any, Any]]]) -> None:
    """Stages 0 to 3, offloaded or not, all parameters or LoRA's, with accumulation and without, activations kept or
    computed again. Gradients are compared by their norms: Adam's steps hide a scale."""
    found, _ = trained("losses")
    assert len(found) == 7 * 5
    for (stage, kind, accumulation), (losses, norms) in found.items():
        case = f"ZeRO-{stage}, {kind}, accumulation {accumulation}"
        expected_losses, expected_norms = found["0", kind.partition(",")[0], 1]
        assert losses == pytest.approx(expected_losses, rel=1e-4), case
        assert norms == pytest.approx(expected_norms, rel=1e-3), case
    assert found["0", "full", 1][0] != pytest.approx(found["0", "lora", 1][0], rel=1e-3)


def test_so_are_muons(trained: Callable[[str], list[dict[Any, Any]]]) -> None:
    found, _ = trained("muon")
    assert len(found) == 4 * 2
    for (stage, kind), losses in found.items():
        assert losses == pytest.approx(found[0, kind], rel=1e-4), f"ZeRO-{stage}, {kind}"
        assert kind == "lora" or losses[-1] < losses[0]


def test_the_average_is_that_of_the_weights_and_is_resumed_to_the_bit(
    trained: Callable[[str], list[dict[Any, Any]]],
) -> None:
    found, _ = trained("averages")
    assert len(found) == 4 * 2
    for case, (average, expected, resumed) in found.items():
        tolerance = 1e-6 if case[1] == "float32" else 4e-3  # the expectation is made of bfloat16 weights
        assert average.keys() == expected.keys() == resumed.keys()
        for name in average:
            torch.testing.assert_close(
                average[name].float(), expected[name], rtol=0, atol=tolerance, msg=f"{case} {name}"
            )
            assert torch.equal(average[name], resumed[name]), (case, name)


def test_a_spoilt_step_leaves_no_trace(trained: Callable[[str], list[dict[Any, Any]]]) -> None:
    """Whatever the rank, whatever the way: weights, optimizer, average and schedule are as without the step."""
    for rank, found in enumerate(trained("skipping")):
        assert len(found) == 4 + 2 + 2 + 1
        for case, (expected, left, entries) in found.items():
            where = f"rank {rank}, {case}"
            assert [entry["skipped"] for entry in entries] == [0, 0, 1, 1], where
            assert [entry["grad_norm"] is None for entry in entries] == [False, False, True, False], where
            assert left["schedule"] == expected["schedule"], where
            assert left["weights"].keys() == expected["weights"].keys()
            assert all(torch.equal(left["weights"][name], value) for name, value in expected["weights"].items()), where
            for state, value in zip(left["states"], expected["states"], strict=True):
                assert torch.equal(torch.as_tensor(state), torch.as_tensor(value)), where
