"""keep_last in real vLLM on the CPU: the steps before the first NaN of a running service."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from .engines import PROMPTS, dumped, engine, generate, rows, worker
from .planted import SITE, set_weight

pytestmark = pytest.mark.vllm
HEALTHY = 6
"""Steps before the weight is broken."""
NORM = f"Module.model.{SITE}.RMSNorm.forward.0"


def serve(llm: Any, steps: int, tokens: dict[str, int]) -> None:
    """Two requests, the second of which joins in step 2; the weight is broken before step HEALTHY."""
    from vllm import SamplingParams

    serving = llm.llm_engine
    for step in range(steps):
        for (name, count), prompt, joins in zip(tokens.items(), PROMPTS, (0, 2), strict=False):
            if step == joins:
                serving.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        if step == HEALTHY:
            set_weight(worker(llm).get_model(), float("nan"))
        serving.step()
    assert not serving.has_unfinished_requests()


@pytest.mark.parametrize(("level", "task"), [("L0", "statistics"), ("mix", "tensor")])
def test_a_nan_planted_in_a_weight_is_named_as_the_first(
    tiny_model: Path, tmp_path: Path, level: str, task: str, caplog: pytest.LogCaptureFixture
) -> None:
    dump = tmp_path / "dump"
    config = {"task": task, "level": level, "dump_path": str(dump), "keep_last": 3, "flush_on": ["nan"]}
    with engine(tiny_model, additional_config={"dump_config": config}) as llm, caplog.at_level(logging.WARNING):
        serve(llm, 10, {"first": 10, "second": 8})
    steps = dumped(dump)
    assert [step.folder.parent.name for step in steps] == ["step4", "step5", "step6"]
    for step in steps:
        assert step.finished
        assert step.manifest is not None
        assert list(rows(step)) == ["first", "second"]
        told = step.manifest["flushed"]
        assert (told["on"], told["step"], told["requests"]) == ("nan", HEALTHY, ["first", "second"])
        if level == "L0":
            assert (told["entry"], told["position"]) == (NORM, "output.0")
        else:  # an operator in it, whose call ends before the module's: it is given the weight
            assert told["position"].startswith("input_args.")
            (tensor,) = (at for at in step.tensors() if at[:2] == (told["entry"], told["position"]))
            assert step.data[tensor.entry]["site"]["module"] == f"model.{SITE}"
            assert tensor.record["shape"] == [128]
    # Not in inputs: operators that write their output into a buffer are given what happens to lie there.
    outputs = [[each for each in step.tensors() if each.position.startswith("output")] for step in steps]
    bad = [[tensor.entry for tensor in tensors if tensor.record.get("nan_count")] for tensors in outputs]
    assert bad[:2] == [[], []]
    assert bad[2][0] == steps[2].manifest["flushed"]["entry"]  # type: ignore[index]
    (said,) = (record.getMessage() for record in caplog.records if "has a NaN" in record.getMessage())
    assert said.startswith(f"step 6 has a NaN, first in {told['entry']} {told['position']} (requests: first, second)")
    assert "steps 4, 5, 6 are written to" in said


def test_a_preempted_request_is_not_over(tiny_model: Path, tmp_path: Path) -> None:
    """The blocks are not enough for three, so the last one waits until another one is over."""
    dump = tmp_path / "dump"
    ring = {"keep_last": 2, "flush_on": ["request"], "statistics": {"request_id": "2"}}
    config = {"level": "L0", "dump_path": str(dump), **ring}
    options = {"block_size": 32, "num_gpu_blocks_override": 7, "max_model_len": 160, "enable_prefix_caching": False}
    waited = []
    with engine(tiny_model, additional_config={"dump_config": config}, **options) as llm:
        execute_model = worker(llm).execute_model

        def watched(scheduled: Any) -> Any:
            names = {name.partition("-")[0] for name in scheduled.num_scheduled_tokens}
            waited.append("2" not in names)
            return execute_model(scheduled)

        worker(llm).execute_model = watched
        generate(llm, ["a" * 30, "b" * 30, "c" * 30], [70, 70, 70])
        assert list(dump.glob("step*")) == [], "vLLM in this process says that it is over with the next step"
        generate(llm, PROMPTS[:1], [1])
    served = [number for number, waits in enumerate(waited) if not waits]
    assert served != list(range(served[0], served[-1] + 1)), "it was not preempted"
    steps = dumped(dump)
    assert [step.folder.parent.name for step in steps] == [f"step{number}" for number in served[-2:]]
    assert [step.manifest["flushed"]["on"] for step in steps if step.manifest] == ["request"] * 2
