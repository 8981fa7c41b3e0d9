"""Which request each row of a step belongs to, and where in its sequence: checked against the token ids and positions
that the model was really given."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from msprobe_graph.dump.reader import StepDump, TensorAt

from .engines import PROMPTS, TOKENS, dumped, engine, generate, rows, worker

pytestmark = pytest.mark.vllm
BLOCK = 32
BUDGET = 48
EIGHT = [word * count for word, count in zip("abcdefgh", (3, 150, 11, 2, 65, 27, 200, 70), strict=True)]
WANTED = [6, 3, 5, 9, 1, 4, 2, 7]
LISTED = {"list": ["Qwen2Model", "Qwen2DecoderLayer"]}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Answer(NamedTuple):
    request: str
    tokens: list[int]
    """Of the prompt and the answer, less the last one, which is never put in."""
    prompt: int
    """How many are the prompt's."""


class Served(NamedTuple):
    answers: list[Answer]
    steps: list[StepDump]


def ask(llm: Any, prompts: list[str], wanted: list[int]) -> list[Answer]:
    """All prompts at once."""
    from vllm import SamplingParams

    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in wanted]
    answers = llm.generate(prompts, params, use_tqdm=False)
    return [
        Answer(each.request_id, [*each.prompt_token_ids, *each.outputs[0].token_ids][:-1], len(each.prompt_token_ids))
        for each in answers
    ]


def of_model(step: StepDump, entry: str, position: str) -> torch.Tensor:
    """The saved values at `position` of the only entry that `entry` is a part of."""
    (found,) = (tensor for tensor in step.tensors() if entry in tensor.entry and tensor.position == position)
    return step.load(found)


def assert_rows_are_right(step: StepDump, answers: list[Answer]) -> dict[str, range]:
    """Each request's positions in the step."""
    tokens = {answer.request: answer.tokens for answer in answers}
    ids, positions = (of_model(step, "Qwen2Model", f"input_args.{place}").tolist() for place in (0, 1))
    assert step.manifest is not None
    found = {}
    end = 0
    for each in step.manifest["requests"]:
        assert each["begin"] == end
        end = each["end"]
        mine = slice(each["begin"], end)
        first, last = each["positions"]
        assert positions[mine] == list(range(first, last))
        assert ids[mine] == tokens[each["request"]][first:last]
        found[each["request"]] = range(first, last)
    assert len(ids) == end
    return found


def phases(step: StepDump) -> dict[str, str]:
    assert step.manifest is not None
    return {each["request"]: each["phase"] for each in step.manifest["requests"]}


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Reads at most BUDGET tokens a step, of at most four requests, and keeps what they have in common."""
    config = {"task": "tensor", "level": "L0", "dump_path": str(tmp_path_factory.mktemp("batches") / "dump")}
    options = {"max_num_batched_tokens": BUDGET, "max_num_seqs": 4, "block_size": BLOCK, "enable_prefix_caching": True}
    with engine(tiny_model, additional_config={"dump_config": {**config, "tensor": LISTED}}, **options) as llm:
        llm.dump = Path(config["dump_path"])
        yield llm


@pytest.fixture(scope="module")
def eight(llm: Any) -> Served:
    """Eight requests of different lengths at once."""
    answers = ask(llm, EIGHT, WANTED)
    return Served(answers, dumped(llm.dump))


def test_each_row_is_the_token_at_its_position(eight: Served) -> None:
    covered = defaultdict(list)
    for step in eight.steps:
        for request, positions in assert_rows_are_right(step, eight.answers).items():
            covered[request].extend(positions)
    assert covered == {answer.request: list(range(len(answer.tokens))) for answer in eight.answers}


def test_requests_join_and_leave(eight: Served) -> None:
    together = [set(rows(step)) for step in eight.steps]
    assert max(map(len, together)) == 4
    assert sum(before != after for before, after in itertools.pairwise(together)) > 5
    orders = [list(rows(step)) for step in eight.steps]
    assert any(order != sorted(order) for order in orders), "rows in the order of arrival show nothing"


def test_a_chunk_of_a_prompt_is_prefill(eight: Served) -> None:
    chunks = defaultdict(int)
    for step in eight.steps:
        assert step.manifest is not None
        for each in step.manifest["requests"]:
            (prompt,) = (answer.prompt for answer in eight.answers if answer.request == each["request"])
            assert each["phase"] == ("prefill" if each["positions"][0] < prompt else "decode")
            chunks[each["request"]] += each["phase"] == "prefill"
    lengths = {answer.request: answer.prompt for answer in eight.answers}
    assert all(chunks[request] >= -(-length // BUDGET) for request, length in lengths.items())
    assert max(chunks.values()) > 1
    assert any(len(set(phases(step).values())) == 2 for step in eight.steps), "none does both at once"


def test_rows_hold_what_each_request_has_alone(llm: Any, eight: Served) -> None:
    def hidden_states(steps: list[StepDump], request: str) -> torch.Tensor:
        states = (of_model(step, "layers.1.Qwen2DecoderLayer", "output.0") for step in steps if request in rows(step))
        mine = (rows(step)[request] for step in steps if request in rows(step))
        return torch.cat([state[part] for state, part in zip(states, mine, strict=True)])

    for prompt, wanted, answer in zip(EIGHT, WANTED, eight.answers, strict=True):
        llm.reset_prefix_cache()
        before = len(dumped(llm.dump))
        (alone,) = ask(llm, [prompt], [wanted])
        assert alone.tokens == answer.tokens
        expected = hidden_states(dumped(llm.dump)[before:], alone.request)
        torch.testing.assert_close(hidden_states(eight.steps, answer.request), expected, **TOLERANCE)


def test_a_cached_prefix_is_not_among_the_rows(llm: Any) -> None:
    llm.reset_prefix_cache()
    prefix = "the same long beginning " * 6
    before = len(dumped(llm.dump))
    (first,) = ask(llm, [prefix + "x"], [2])
    then = ask(llm, [prefix + "y", prefix + "x"], [2, 2])
    steps = dumped(llm.dump)[before:]
    assert first.prompt > 2 * BLOCK
    begins = {}
    for step in steps:
        for request, positions in assert_rows_are_right(step, [first, *then]).items():
            begins.setdefault(request, (positions.start, phases(step)[request]))
    cached = (first.prompt - 1) // BLOCK * BLOCK
    assert begins == {
        first.request: (0, "prefill"),
        **{answer.request: (cached, "prefill") for answer in then},
    }


def test_a_preempted_request_begins_anew(tiny_model: Path, tmp_path: Path) -> None:
    config = {"task": "tensor", "level": "L0", "dump_path": str(tmp_path / "dump"), "tensor": LISTED}
    options = {"block_size": BLOCK, "num_gpu_blocks_override": 7, "max_model_len": 160, "enable_prefix_caching": False}
    prompts = ["a" * 30, "b" * 30, "c" * 30]
    with engine(tiny_model, additional_config={"dump_config": config}, **options) as llm:
        answers = ask(llm, prompts, [70, 70, 70])
    steps = dumped(tmp_path / "dump")
    seen = defaultdict(list)
    for step in steps:
        for request, positions in assert_rows_are_right(step, answers).items():
            seen[request].append((positions, phases(step)[request]))
    anew = 0
    for answer in answers:
        reached = 0
        for positions, phase in seen[answer.request]:
            assert positions.start in (0, reached)
            assert phase == ("decode" if positions.start else "prefill")
            anew += positions.start < reached
            reached = positions.stop
        assert reached == len(answer.tokens)
    assert anew, "no request was preempted"


def test_padding_is_in_no_tensor(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no graphs to pad a batch for, so here its runner is told to pad as if it had."""
    from vllm.forward_context import BatchDescriptor, get_forward_context

    config = {"task": "tensor", "level": "mix", "dump_path": str(tmp_path / "dump"), "risk_level": "ALL"}
    ran = []
    with engine(tiny_model, enable_prefix_caching=False, additional_config={"dump_config": config}) as llm:
        tokens = generate(llm)
        dispatcher = worker(llm).model_runner.cudagraph_dispatcher
        dispatch = dispatcher.dispatch

        def padded(*args: Any, **kwargs: Any) -> Any:
            mode, batch = dispatch(*args, **kwargs)
            return mode, BatchDescriptor(-(-(batch.num_tokens + 1) // 16) * 16)

        monkeypatch.setattr(dispatcher, "dispatch", padded)
        worker(llm).get_model().register_forward_pre_hook(
            lambda model, args, kwargs: ran.append((get_forward_context().batch_descriptor, kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        assert generate(llm) == tokens
    assert all(batch.num_tokens == shape[0] and shape[0] % 16 == 0 for batch, shape in ran)
    steps = dumped(tmp_path / "dump")
    compared = 0
    for exact, step in zip(steps[: max(TOKENS)], steps[max(TOKENS) :], strict=True):
        for ours, other in zip(computed(exact), computed(step), strict=True):
            assert (ours.entry, ours.position) == (other.entry, other.position)
            assert ours.record["shape"] == other.record["shape"], (other.entry, other.position)
            if "data_name" in ours.record and other.record["dtype"] == "torch.float32":
                torch.testing.assert_close(exact.load(ours), step.load(other), **TOLERANCE)
                compared += 1
    assert compared > 100 * len(PROMPTS)


def computed(step: StepDump) -> list[TensorAt]:
    """What modules and vLLM's own operators computed. (Memory that they are to write into may hold anything before.)"""
    return [
        tensor
        for tensor in step.tensors()
        if tensor.entry.startswith("Module.")
        or (tensor.entry.startswith("_C.") and tensor.position.startswith("output"))
    ]
