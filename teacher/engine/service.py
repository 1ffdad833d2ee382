"""The teacher behind running `vllm serve` processes, through their OpenAI-compatible API.

Token ids go out and come back, with the logprobs of the top K: the same numbers that the engine in this process
captures. They travel as JSON, 2.5 kB a token at K = 64, which costs this process 70 µs a token: where servers give more
than some 10,000 tokens/s, several collectors share them.

Requests are spread over the servers by what each has in flight. One that fails because its server cannot be reached, is
overloaded or restarts is sent again, to whichever server is up, with growing pauses (tenacity). Patience counts the
time that a request is with no server: one that was decoded for an hour has lost none of it. A server that says nothing
for so long is asked whether it is there. Before its first request, and again whenever it was away, a server is asked
what it is: another model, another context length, too small a `max_logprobs`, logprobs after temperature, speculation
or a quantized KV cache would all give rows that look right.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import aiohttp
import msgspec
import numpy as np
import tenacity

from shared.config import ServiceConfig, TeacherConfig
from shared.dataset.records import FinishReason, Sampling
from shared.errors import ServiceError
from teacher.capture import Columns
from teacher.checkpoints import vocabulary_size
from teacher.engine.requests import Answer, Request

log = logging.getLogger(__name__)

Result = TypeVar("Result")

API_KEY = "VLLM_API_KEY"
_LONGEST_PAUSE = 10.0
"""Seconds between two tries of a request, at most, and that a server which failed is left alone."""
_CONNECT_S = 10.0
_NO_PROBABILITY = -9999.0
"""What vLLM's API writes for minus infinity, which JSON has not."""
_MASS_ERROR = 0.01
_UNQUANTIZED = frozenset({"auto", "float32", "float16", "bfloat16", "half", "float"})
_FLAGS = "`teacher serve CONFIG` prints the command of a server with the right flags"


class _RefusedError(ServiceError):
    """The server is well and refuses this request."""


class _UnavailableError(Exception):
    """The server cannot answer now; it, or another one, may later."""


_PASSING = (_UnavailableError, aiohttp.ClientError, TimeoutError, OSError)
"""Errors after which a request is sent again."""


@dataclass(slots=True)
class _Server:
    """One server: what it calls the model, how many requests it has, and until when it is left alone."""

    url: str
    name: str | None = None
    in_flight: int = 0
    rests_until: float = 0.0
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Asked:
    """A request on its way: its body, and the seconds that it was with servers that then were gone."""

    body: dict[str, Any]
    served: float = 0.0


class ServiceEngine:
    """A teacher that others serve.

    Args:
        top_k: candidates per token, K.
        score: whether responses will be scored, of which a server gets few at a time.

    Raises:
        ServiceError: if no server is up within `teacher.service.patience_minutes`, or one is not as it must be.
    """

    capture = "json"

    def __init__(self, teacher: TeacherConfig, top_k: int, score: bool = False) -> None:
        assert teacher.service is not None
        self._teacher, self._service, self._top_k = teacher, teacher.service, top_k
        full = 2 * teacher.max_num_seqs * teacher.data_parallel
        self._per_server = 8 if score else teacher.service.requests_in_flight or full
        self._patience = 60 * teacher.service.patience_minutes
        self._vocabulary = vocabulary_size(teacher)
        self.head_dtype = "float32" if teacher.fp32_head else teacher.dtype  # as `teacher serve` starts it
        self._loop = asyncio.new_event_loop()
        self._servers = [_Server(url) for url in self._service.urls]
        self._session: Any = None
        try:
            self._run(self._open())
        except BaseException:
            self.close()
            raise

    def stream(self, requests: Iterable[Request], capture: bool = True) -> Iterator[Answer]:
        """Answer `requests`, which are taken as there is room, in the order in which they finish.

        A request that a server refuses is answered with an `error`.

        Raises:
            ServiceError: if a server answers what is no answer, or is not as it must be, or none is up for too long.
        """
        waiting = iter(requests)
        tasks: set[asyncio.Task[Answer]] = set()
        done: set[asyncio.Task[Answer]] = set()
        try:
            while True:
                for request in islice(waiting, self._per_server * len(self._servers) - len(tasks)):
                    tasks.add(self._loop.create_task(self._answer(request, capture)))
                if not tasks:
                    return
                done, tasks = self._run(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                for task in done:
                    yield task.result()
        finally:
            self._cancel(tasks | done)

    def close(self) -> None:
        """Close the connections; the servers go on."""
        if self._loop.is_closed():
            return
        self._cancel(asyncio.all_tasks(self._loop))
        if self._session is not None:
            self._run(self._session.close())
        self._loop.close()

    def _run(self, awaitable: Awaitable[Result]) -> Result:
        return self._loop.run_until_complete(awaitable)

    def _cancel(self, tasks: set[asyncio.Task[Any]]) -> None:
        """End `tasks`: the servers see their connections close, and abort what they were asked."""
        for task in tasks:
            task.cancel()
        if tasks and not self._loop.is_closed():
            self._run(asyncio.gather(*tasks, return_exceptions=True))

    async def _open(self) -> None:
        self._session = _session(self._service)
        await self._retry(self._any_ready, _Asked({}))

    async def _any_ready(self, _asked: _Asked) -> None:
        """Check every server; those that are down are left for later as long as one is up."""
        found = await asyncio.gather(*map(self._ready, self._servers), return_exceptions=True)
        errors = [error for error in found if error is not None]
        wrong = next((error for error in errors if not isinstance(error, _PASSING)), None)
        if wrong is not None or len(errors) == len(found):
            raise wrong or errors[0]
        for server, error in zip(self._servers, found, strict=True):
            if error is not None:
                log.warning("%s is not up (%s); it gets requests once it is", server.url, error)

    async def _answer(self, request: Request, capture: bool) -> Answer:
        try:
            choice = await self._retry(self._ask, _Asked(self._body(request, capture)))
        except _RefusedError as error:
            return Answer(request.key, np.zeros(0, np.int32), "unknown", None, error=str(error))
        try:
            if request.response_ids is not None:
                rows = choice["prompt_logprobs"][1:]
                ids = choice["prompt_token_ids"][1:]
                tops = [{int(key): entry["logprob"] for key, entry in row.items()} for row in rows]
                columns = to_columns(ids, tops, self._top_k)
                return Answer(request.key, request.response_ids, "unknown", columns)
            ids = choice["token_ids"]
            reason: FinishReason = (
                choice["finish_reason"] if choice["finish_reason"] in ("stop", "length") else "unknown"
            )
            columns_or_none = to_columns(ids, _by_id(choice), self._top_k) if capture else None
            return Answer(request.key, np.asarray(ids, dtype=np.int32), reason, columns_or_none)
        except (KeyError, TypeError, ValueError) as error:
            raise ServiceError(
                f"a server answered {request.key!r} with no rows that can be read ({error!r}); {_FLAGS}"
            ) from error

    def _body(self, request: Request, capture: bool) -> dict[str, Any]:
        """The API's own defaults come from the model's generation_config.json, so every setting is stated."""
        sampling, prompt = request.sampling, request.prompt_ids.tolist()
        if request.response_ids is not None:
            prompt += request.response_ids.tolist()
            sampling = Sampling(0, 1, 0, 1, None)
        body: dict[str, Any] = {
            "prompt": prompt,
            # The API refuses more than its context holds, where the engine in process ends the answer there.
            "max_tokens": min(sampling.max_tokens, self._teacher.max_sequence_tokens - len(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sampling.seed,
            "ignore_eos": request.ignore_end,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if request.response_ids is not None:
            body["prompt_logprobs"] = self._top_k
        elif capture:
            body["logprobs"] = self._top_k
        return body

    # --- servers ------------------------------------------------------------------------------------------------

    async def _retry(self, attempt: Callable[[_Asked], Awaitable[Result]], asked: _Asked) -> Result:
        """What `attempt` gives, tried again while no server can; `ServiceError` once patience has run out."""
        tries = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_PASSING),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE),
            stop=lambda state: (state.seconds_since_start or 0) - asked.served >= self._patience,
            reraise=True,
        )
        try:
            return await tries(attempt, asked)
        except _PASSING as error:
            raise ServiceError(
                f"no server of teacher.service.urls ({', '.join(self._service.urls)}) answered for "
                f"{self._service.patience_minutes:g} minutes (teacher.service.patience_minutes): "
                f"{error or type(error).__name__}; start them and run this again, which goes on where it stopped"
            ) from error

    async def _ask(self, asked: _Asked) -> dict[str, Any]:
        """One try of a completion, at the server with the fewest requests among those that are up."""
        now = self._loop.time()
        server = min(self._servers, key=lambda server: (server.rests_until > now, server.in_flight))
        server.in_flight += 1
        try:
            await self._ready(server)
            taken = self._loop.time()
            try:
                return await self._complete(server, asked.body)
            except (aiohttp.ClientError, TimeoutError, OSError):
                asked.served += self._loop.time() - taken
                raise
        finally:
            server.in_flight -= 1

    async def _complete(self, server: _Server, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._while_there(server, self._fetch(server, "/v1/completions", body | {"model": server.name}))
        try:
            choice: dict[str, Any] = answer["choices"][0]
            if not isinstance(choice, dict):
                raise TypeError(choice)
        except (KeyError, IndexError, TypeError) as error:
            raise ServiceError(f"{server.url} answered a completion without choices: it is no vLLM server") from error
        if (answer.get("metrics") or {}).get("speculative_decoding") is not None:
            self._refuse_speculation(server)
        return choice

    async def _while_there(self, server: _Server, answer: Coroutine[Any, Any, Result]) -> Result:
        """`answer`, for as long as its server is there: a long decode is not silence. Errors as `_fetch`."""
        waiting = self._loop.create_task(answer)
        try:
            while not (await asyncio.wait({waiting}, timeout=self._patience))[0]:
                with suppress(_UnavailableError):  # an overloaded server is there, too
                    await self._fetch(server, "/v1/models")
            return waiting.result()
        finally:
            waiting.cancel()
            await asyncio.wait({waiting})

    async def _fetch(self, server: _Server, path: str, body: dict[str, Any] | None = None) -> Any:
        """JSON from a server, or its text where that is none (of /metrics).

        Raises:
            _UnavailableError: if it may answer another time. ServiceError: if it refuses.
        """
        try:
            method, limit = ("GET", self._patience) if body is None else ("POST", None)
            timeout = aiohttp.ClientTimeout(total=limit, sock_connect=_CONNECT_S)
            async with self._session.request(method, server.url + path, json=body, timeout=timeout) as response:
                text = await response.text()
                status = response.status
        except (TimeoutError, aiohttp.ClientError, OSError):
            server.name, server.rests_until = None, self._loop.time() + _LONGEST_PAUSE
            raise
        if status in (408, 425, 429) or status >= 500:
            server.rests_until = self._loop.time() + 1
            raise _UnavailableError(f"{server.url} answered {status} {text[:200]}")
        if status in (401, 403):
            raise ServiceError(f"{server.url} answered {status}: set {API_KEY} to the key that it was started with")
        if status != 200:
            refusal = _RefusedError if status in (400, 413, 422) else ServiceError
            raise refusal(f"{server.url}{path} answered {status}: {_message(text)}")
        try:
            return text if path == "/metrics" else msgspec.json.decode(text)
        except ValueError as error:
            raise ServiceError(
                f"{server.url}{path} answered {text[:60]!r}, which is not JSON; give the URL of a vLLM server"
            ) from error

    async def _ready(self, server: _Server) -> None:
        """Check a server that is new or was away.

        Raises:
            ServiceError: naming what it is and what it must be.
        """
        async with server.checking:
            if server.name is not None:
                return
            name = await self._check_model(server)
            await self._check_metrics(server)
            server.name = name
            try:
                await self._check_logprobs(server)
            except BaseException:
                server.name = None
                raise
            log.info("%s serves %s", server.url, name)

    async def _check_model(self, server: _Server) -> str:
        models = await self._fetch(server, "/v1/models")
        try:
            cards = [(str(card["id"]), str(card.get("root")), card.get("max_model_len")) for card in models["data"]]
        except (KeyError, TypeError) as error:
            raise ServiceError(f"{server.url}/v1/models lists no models: it is no vLLM server; {_FLAGS}") from error
        wanted, room = self._teacher.model, self._teacher.max_sequence_tokens
        found = next((card for card in cards if wanted in card[:2]), None)
        if found is None:
            shown = ", ".join(name if root in (name, "None") else f"{name} ({root})" for name, root, _ in cards)
            raise ServiceError(
                f"{server.url} serves {shown or 'nothing'}, teacher.model is {wanted}; correct one of them, or start "
                f"the server with --served-model-name {wanted} where it is the same model"
            )
        name, _, length = found
        if isinstance(length, int) and length < room:
            raise ServiceError(
                f"{server.url} has a context of {length} tokens, teacher.max_sequence_tokens is {room}; start it with "
                f"--max-model-len {room}, or lower the setting"
            )
        return name

    async def _check_metrics(self, server: _Server) -> None:
        metrics = await self._fetch(server, "/metrics")
        if "vllm:spec_decode_" in metrics:
            self._refuse_speculation(server)
        found = re.search(r'^vllm:cache_config_info\{.*?\bcache_dtype="([^"]*)"', metrics, flags=re.MULTILINE)
        if found is None:
            raise ServiceError(
                f"{server.url}/metrics does not say in which dtype its KV cache is, so a quantized one would go "
                "unnoticed; start it without --disable-log-stats"
            )
        if found[1] not in _UNQUANTIZED:
            raise ServiceError(
                f"{server.url} keeps its KV cache in {found[1]}, with which decoding and scoring disagree by up to "
                "half a nat; start it with --kv-cache-dtype auto"
            )

    def _refuse_speculation(self, server: _Server) -> None:
        server.name = None
        raise ServiceError(
            f"{server.url} decodes speculatively, so a token's row may be of a draft's position and a seed does not "
            "give its text again; start it without --speculative-config"
        )

    async def _check_logprobs(self, server: _Server) -> None:
        """Are the rows whole, those of log-softmax, and those before sampling?"""
        prompt = np.arange(3, 7, dtype=np.int32)
        plain = self._body(Request("probe", prompt, Sampling(0, 1, 0, 2, None), ignore_end=True), capture=True)
        try:
            choice = await self._complete(server, plain)
        except ServiceError as error:
            if "max allowed" not in str(error) and "max_logprobs" not in str(error):
                raise
            raise ServiceError(
                f"{server.url} gives fewer logprobs than collect.top_k {self._top_k} ({error}); start it with "
                "--max-logprobs -1, or lower collect.top_k"
            ) from error
        # All but the first candidate are filtered out here, which rows from before sampling do not show.
        filtered = await self._complete(server, plain | {"temperature": 2.0, "top_k": 1, "seed": 0})
        try:
            raw, processed = _by_id(choice)[0], _by_id(filtered)[0]
            token, again = choice["token_ids"][0], filtered["token_ids"][0]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServiceError(f"{server.url} returns no logprobs by token id; {_FLAGS}") from error
        if max(raw.values()) > 1e-4 or sum(map(math.exp, raw.values())) > 1 + _MASS_ERROR:
            self._refuse_logprobs(server, "are logits")
        masked = len(processed) > 1 and sorted(processed.values())[-2] <= _NO_PROBABILITY
        if masked or (token == again and abs(raw[token] - processed[token]) > 0.5):
            self._refuse_logprobs(server, "are those after temperature and filters")
        await self._check_vocabulary(server, plain)

    async def _check_vocabulary(self, server: _Server, plain: dict[str, Any]) -> None:
        """The whole row where the server gives it: one probability for each token of the teacher's head, 1 in all."""
        try:
            row = _by_id(await self._complete(server, plain | {"logprobs": -1, "max_tokens": 1}))[0]
        except ServiceError as error:
            log.debug("%s: the whole row was not given (%s)", server.url, error)
            return
        mass = sum(map(math.exp, row.values()))
        if len(row) != self._vocabulary:
            raise ServiceError(
                f"{server.url} has {len(row)} tokens, teacher.model {self._teacher.model} has {self._vocabulary}: it "
                "is another model under the same name"
            )
        if abs(mass - 1) > _MASS_ERROR:
            self._refuse_logprobs(server, f"sum to a probability of {mass:.3g}")

    def _refuse_logprobs(self, server: _Server, what: str) -> None:
        raise ServiceError(f"the logprobs of {server.url} {what}; start it with --logprobs-mode raw_logprobs")


def to_columns(ids: list[int], rows: list[dict[int, float]], top_k: int) -> Columns:
    """vLLM's columns of T tokens from a dictionary each, which holds the token first and then the top K.

    The token is among the top K where its dictionary has K entries, and behind them where it has K + 1.

    Raises:
        ValueError: if there are not as many rows as tokens, or one is of neither width or of another token.
    """
    if len(rows) != len(ids):
        raise ValueError(f"{len(rows)} rows for {len(ids)} tokens")
    widths = np.fromiter(map(len, rows), np.int64, len(rows))
    total = int(widths.sum())
    all_ids = np.fromiter((index for row in rows for index in row), np.int32, total)
    all_logprobs = np.fromiter((value for row in rows for value in row.values()), np.float32, total)
    all_logprobs[all_logprobs <= _NO_PROBABILITY] = -np.inf
    starts = np.cumsum(widths) - widths
    if not np.isin(widths, (top_k, top_k + 1)).all() or not np.array_equal(all_ids[starts], ids):
        raise ValueError(f"rows of {sorted(set(widths.tolist()))} candidates, expected {top_k} and the token itself")
    candidates = (starts + widths - top_k)[:, None] + np.arange(top_k)
    columns = np.concatenate([starts[:, None], candidates], axis=1)
    return Columns(all_ids[columns], all_logprobs[columns])


def server_version(service: ServiceConfig) -> str:
    """The version of vLLM that the first server which answers runs, without the mark of its build.

    Raises:
        ServiceError: if none answers, or one with no version.
    """

    async def ask() -> str:
        seen = []
        async with _session(service) as session:
            for url in service.urls:
                try:
                    async with session.get(f"{url}/version") as response:
                        return str((await response.json(content_type=None))["version"]).partition("+")[0]
                except (TimeoutError, aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
                    seen.append(f"{url}: {error or type(error).__name__}")
        raise ServiceError(
            f"no server of teacher.service.urls states its version ({'; '.join(seen)}); start one first: {_FLAGS}"
        )

    return asyncio.run(ask())


def _by_id(choice: dict[str, Any]) -> list[dict[int, float]]:
    """The rows of a completion; their keys are `token_id:N`."""
    return [{int(key[9:]): value for key, value in row.items()} for row in choice["logprobs"]["top_logprobs"]]


def _message(text: str) -> str:
    """What an error of the API says."""
    try:
        return str(msgspec.json.decode(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _session(service: ServiceConfig) -> aiohttp.ClientSession:
    key = os.environ.get(API_KEY)
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        connector=aiohttp.TCPConnector(limit=0, socket_factory=_kept_alive),
        timeout=aiohttp.ClientTimeout(total=60 * service.patience_minutes, sock_connect=_CONNECT_S),
    )


def _kept_alive(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that asks the other end each minute whether it is there: no byte comes while a server decodes."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            made.setsockopt(socket.IPPROTO_TCP, option, 60)
    return made
