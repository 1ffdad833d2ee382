"""What a client of servers must see and survive. The servers here are scripted; real ones are in test_served.py."""

from __future__ import annotations

import importlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared.config import TeacherConfig
from shared.dataset.records import Sampling
from shared.errors import ServiceError
from teacher.engine import Request, version_of
from teacher.engine.serve import serve
from teacher.engine.service import ServiceEngine, _by_id, to_columns

V = 300
"""Tokens of the tiny checkpoint."""
METRICS = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0"} 1.0\n'


class Script:
    """A server: a uniform distribution over V tokens, of which the first is generated; fields change what it is."""

    def __init__(self, model: str) -> None:
        self.models: Any = {"data": [{"id": model, "root": model, "max_model_len": 128}]}
        self.metrics = METRICS
        self.most, self.offset, self.processed, self.speculates = V, 0.0, False, False
        self.statuses: list[int] = []
        self.seconds: list[float] = []  # that the next completions take
        self.breaks = 0  # how many of them break off
        self.bodies: list[dict[str, Any]] = []
        self.text: str | None = None
        self.tokens = V
        handler = type("Handler", (_Handler,), {"script": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        if self.text is not None:
            return 200, self.text
        if path == "/version":
            return 200, json.dumps({"version": "0.32.0+cpu"})
        if path == "/v1/models":
            return 200, json.dumps(self.models)
        if path == "/metrics":
            return 200, self.metrics
        assert body is not None
        self.bodies.append(body)
        if self.seconds:
            time.sleep(self.seconds.pop(0))
        if self.breaks:
            self.breaks -= 1
            return 0, ""
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return status, json.dumps({"error": {"message": "no such luck"}})
        k = self.tokens if body["logprobs"] == -1 else body["logprobs"]
        if k > self.most:
            return 400, json.dumps(
                {"error": {"message": f"Requested {k}, which is greater than max allowed: {self.most}"}}
            )
        row = {f"token_id:{i}": math.log(1 / self.tokens) + self.offset for i in range(k)}
        if self.processed and body["top_k"] == 1:
            row = {key: 0.0 if key == "token_id:0" else -9999.0 for key in row}
        choice = {
            "token_ids": [0] * body["max_tokens"], "finish_reason": "length",
            "logprobs": {"top_logprobs": [row] * body["max_tokens"]},
        }  # fmt: skip
        metrics = {"speculative_decoding": {"drafts": 1}} if self.speculates else None
        return 200, json.dumps({"choices": [choice], "metrics": metrics})


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        self._reply(*self.script.answer(self.path, None))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._reply(*self.script.answer(self.path, body))

    def _reply(self, status: int, text: str) -> None:
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def script(tiny_checkpoint: Path) -> Iterator[Script]:
    script = Script(str(tiny_checkpoint))
    yield script
    script.server.shutdown()
    script.server.server_close()


def teacher_of(checkpoint: Path, *urls: str, **service: Any) -> TeacherConfig:
    service = {"urls": list(urls), "patience_minutes": 0.05} | service
    return TeacherConfig.model_validate(
        {"model": str(checkpoint), "max_sequence_tokens": 128, "max_num_seqs": 2, "service": service}
    )


def requests(count: int) -> list[Request]:
    prompt = np.array([5, 6], np.int32)
    return [Request(f"r{i}", prompt, Sampling(1.0, 0.9, 7, 3, i)) for i in range(count)]


def test_requests_state_every_setting_and_answers_are_columns(script: Script, tiny_checkpoint: Path) -> None:
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=4)
    answers = {answer.key: answer for answer in engine.stream(requests(9))}
    engine.close()
    engine.close()
    assert answers.keys() == {f"r{i}" for i in range(9)}
    for answer in answers.values():
        assert answer.columns is not None
        np.testing.assert_array_equal(answer.columns.ids, [[0, 0, 1, 2, 3]] * 3)
        np.testing.assert_allclose(answer.columns.logprobs, -math.log(V), rtol=1e-6)
    body = next(body for body in script.bodies if body["seed"] == 8)
    expected = {
        "model": str(tiny_checkpoint), "prompt": [5, 6], "temperature": 1.0, "top_p": 0.9, "top_k": 7, "max_tokens": 3,
        "logprobs": 4, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }  # fmt: skip
    assert expected.items() <= body.items()


def test_a_server_in_trouble_is_asked_again(script: Script, tiny_checkpoint: Path) -> None:
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=4)
    script.statuses = [503, 200, 500, 429]
    assert len(list(engine.stream(requests(6)))) == 6
    engine.close()


def test_a_request_that_is_refused_costs_only_itself(script: Script, tiny_checkpoint: Path) -> None:
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=4)
    script.statuses = [200, 400]
    answers = list(engine.stream(requests(5)))
    engine.close()
    assert [answer.error for answer in answers if answer.error is not None] == [
        f"{script.url}/v1/completions answered 400: no such luck"
    ]
    assert sum(answer.columns is not None for answer in answers) == 4


def test_the_other_server_takes_over_and_a_returning_one_is_checked_again(
    script: Script, tiny_checkpoint: Path
) -> None:
    other = Script(str(tiny_checkpoint))
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url, other.url), top_k=4)
    assert len(list(engine.stream(requests(8)))) == 8
    assert min(len(script.bodies), len(other.bodies)) > 5  # three probes each, and turns
    other.server.shutdown()
    other.server.server_close()
    before = len(script.bodies)
    assert len(list(engine.stream(requests(8)))) == 8
    assert len(script.bodies) == before + 8
    engine._servers[0].name = None  # as after a broken connection
    script.models = {"data": [{"id": "another", "root": "another"}]}
    with pytest.raises(ServiceError, match="serves another, teacher"):
        list(engine.stream(requests(1)))
    engine.close()


def test_one_server_that_is_up_is_enough(script: Script, tiny_checkpoint: Path) -> None:
    engine = ServiceEngine(teacher_of(tiny_checkpoint, "http://127.0.0.1:9", script.url), top_k=4)
    assert len(list(engine.stream(requests(5)))) == 5
    engine.close()


def test_patience_ends(tiny_checkpoint: Path) -> None:
    teacher = teacher_of(tiny_checkpoint, "http://127.0.0.1:9", patience_minutes=0.01)
    with pytest.raises(ServiceError, match=r"no server of teacher.service.urls \(http://127.0.0.1:9\) answered for 0"):
        ServiceEngine(teacher, top_k=4)
    with pytest.raises(ServiceError, match=r"no server .* states its version .*`teacher serve CONFIG`"):
        version_of(teacher)


def test_a_long_decode_costs_no_patience(script: Script, tiny_checkpoint: Path) -> None:
    """Longer than the server may be silent, and lost at its end: the request is sent again."""
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url, patience_minutes=0.02), top_k=4)
    script.seconds, script.breaks = [2.0, 2.0], 1
    (answer,) = engine.stream(requests(1))
    assert answer.columns is not None
    assert not script.seconds
    # Silent for as long, and gone when it is asked whether it is there.
    script.seconds = [8.0]

    def go() -> None:
        script.server.shutdown()
        script.server.server_close()

    threading.Timer(0.5, go).start()
    started = time.monotonic()
    with pytest.raises(ServiceError, match="answered for 0"):
        list(engine.stream(requests(1)))
    assert time.monotonic() - started < 7
    engine.close()


def test_an_answer_longer_than_the_context_is_not_asked_for(script: Script, tiny_checkpoint: Path) -> None:
    """The API refuses such a request, which the engine in process answers up to the end of its context."""
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=4)
    (answer,) = engine.stream([replace(requests(1)[0], sampling=Sampling(0, 1, 0, 1000, None))])
    engine.close()
    assert len(answer.response_ids) == script.bodies[-1]["max_tokens"] == 128 - 2


def test_the_version_is_the_servers(script: Script, tiny_checkpoint: Path) -> None:
    assert version_of(teacher_of(tiny_checkpoint, script.url)) == "0.32.0"


def test_abandoned_requests_end(script: Script, tiny_checkpoint: Path) -> None:
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=4)
    stream = engine.stream(requests(50))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(list(engine.stream(requests(3)))) == 3
    engine.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "<html>hello</html>"}, r"/v1/models answered '<html>hello</html>', which is not JSON; give the URL"),
        ({"text": "[]"}, "lists no models: it is no vLLM server"),
        (
            {"models": {"data": [{"id": "llama", "root": "/m/llama"}]}},
            r"serves llama \(/m/llama\), teacher.model is",
        ),
        ({"length": 64}, "has a context of 64 tokens, teacher.max_sequence_tokens is 128; .*--max-model-len 128"),
        ({"metrics": "python_info 1"}, "does not say in which dtype its KV cache is.*--disable-log-stats"),
        ({"metrics": METRICS.replace("auto", "fp8_e4m3")}, "keeps its KV cache in fp8_e4m3, .*--kv-cache-dtype auto"),
        ({"metrics": METRICS + "vllm:spec_decode_num_drafts_total 0\n"}, "decodes speculatively.*--speculative-config"),
        ({"speculates": True}, "decodes speculatively"),
        (
            {"most": 3},
            r"fewer logprobs than collect.top_k 4 .*max allowed: 3.*--max-logprobs -1, or lower collect",
        ),
        ({"offset": 7.0}, "are logits; start it with --logprobs-mode raw_logprobs"),
        ({"offset": -9.0}, "sum to a probability of .*; start it with --logprobs-mode raw_logprobs"),
        ({"processed": True}, "are those after temperature and filters; start it with --logprobs-mode raw_logprobs"),
        ({"tokens": 200}, "has 200 tokens, teacher.model .* has 300: it is another model under the same name"),
        ({"statuses": [401]}, "answered 401: set VLLM_API_KEY"),
        ({"statuses": [400]}, "/v1/completions answered 400: no such luck"),
    ],
)
def test_a_server_that_would_give_other_rows_is_refused(
    script: Script, tiny_checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    for name, value in change.items():
        if name == "length":
            script.models["data"][0]["max_model_len"] = value
        else:
            setattr(script, name, value)
    with pytest.raises(ServiceError, match=message):
        ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=4)


def test_vllms_own_api_takes_the_requests_and_writes_such_answers(script: Script, tiny_checkpoint: Path) -> None:
    """The fields and the format of this vLLM; a server of it is in test_served.py."""
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    serving = importlib.import_module("vllm.entrypoints.openai.completion.serving")
    logprob = importlib.import_module("vllm.logprobs").Logprob
    engine = ServiceEngine(teacher_of(tiny_checkpoint, script.url), top_k=2)
    request = Request("r", np.array([5, 6], np.int32), Sampling(0.5, 0.9, 7, 3, 1 << 62))
    for body in (
        engine._body(request, capture=True),
        engine._body(replace(request, response_ids=np.array([7], np.int32)), capture=True),
    ):
        assert body.keys() <= protocol.CompletionRequest.model_fields.keys()
        parsed = protocol.CompletionRequest.model_validate(body)
        # What the request states must win over the defaults of a model's generation_config.json.
        defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "min_p": 0.2}
        sampling = parsed.to_sampling_params(body["max_tokens"], defaults)
        stated = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens")
        assert {name: getattr(sampling, name) for name in stated} == {name: body[name] for name in stated}
        assert (sampling.logprobs, sampling.prompt_logprobs) == (body.get("logprobs"), body.get("prompt_logprobs"))
    engine.close()
    rows = [
        {7: logprob(-3.0, 9, "a"), 5: logprob(-0.5, 1, "b"), 6: logprob(float("-inf"), 2, "c")},  # the token is outside
        {5: logprob(-0.25, 1, "b"), 7: logprob(-2.0, 2, "a")},
    ]
    written = serving.OpenAIServingCompletion._create_completion_logprobs(
        SimpleNamespace(
            return_tokens_as_token_ids=False,
            _get_decoded_token=serving.OpenAIServingCompletion._get_decoded_token,
        ),
        [7, 5], rows, 2, None, return_as_token_id=True,
    )  # fmt: skip
    columns = to_columns([7, 5], _by_id({"logprobs": json.loads(written.model_dump_json())}), top_k=2)
    np.testing.assert_array_equal(columns.ids, [[7, 5, 6], [5, 5, 7]])
    np.testing.assert_array_equal(columns.logprobs, np.float32([[-3, -0.5, -np.inf], [-0.25, -0.25, -2]]))


def test_columns_hold_the_token_and_then_the_candidates() -> None:
    inside, outside = {7: -0.5, 5: -1.0, 9: -9999.0}, {8: -6.0, 7: -0.5, 5: -1.0, 9: -2.0}
    columns = to_columns([7, 8], [inside, outside], top_k=3)
    np.testing.assert_array_equal(columns.ids, [[7, 7, 5, 9], [8, 7, 5, 9]])
    np.testing.assert_allclose(columns.logprobs, [[-0.5, -0.5, -1, -np.inf], [-6, -0.5, -1, -2]])
    assert to_columns([], [], top_k=3).ids.shape == (0, 4)
    for ids, rows in (([7], [inside, outside]), ([5], [inside]), ([7], [{7: -1.0}])):
        with pytest.raises(ValueError, match="rows"):
            to_columns(ids, rows, top_k=3)


def test_the_command_of_a_server_has_the_flags_that_the_probe_asks_for(tiny_checkpoint: Path) -> None:
    settings = {"data_parallel": 2, "quantization": "fp8", "prefix_caching": False, "dtype": "bfloat16"}
    teacher = TeacherConfig.model_validate({"model": str(tiny_checkpoint), "max_sequence_tokens": 128} | settings)
    text = serve(teacher, "0.0.0.0", 8123)
    for flag in (
        f"--served-model-name {tiny_checkpoint}", "--max-logprobs -1", "--logprobs-mode raw_logprobs", "--port 8123",
        "--kv-cache-dtype auto", "--data-parallel-size 2", "--quantization fp8", "--no-enable-prefix-caching",
        "--max-model-len 128", "--host 0.0.0.0", """--hf-overrides '{"head_dtype": "float32"}'""",
    ):  # fmt: skip
        assert flag in text
