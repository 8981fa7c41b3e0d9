"""keep_last in real vLLM on the CPU: the steps before the first NaN of a running service."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from .engines import PROMPTS, dumped, engine, rows, worker

pytestmark = pytest.mark.vllm
HEALTHY = 6
"""Steps before the weight is broken."""
NORM = "Module.model.layers.1.post_attention_layernorm.RMSNorm.forward.0"


def serve(llm: Any, steps: int, tokens: dict[str, int]) -> None:
    """Two requests, the second of which joins in step 2; the weight is broken before step HEALTHY."""
    from vllm import SamplingParams

    serving = llm.llm_engine
    for step in range(steps):
        for (name, count), prompt, joins in zip(tokens.items(), PROMPTS, (0, 2), strict=False):
            if step == joins:
                serving.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=count, ignore_eos=True))
        if step == HEALTHY:
            norm = worker(llm).get_model().get_submodule("model.layers.1.post_attention_layernorm")
            with torch.inference_mode():
                norm.weight[3] = float("nan")
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
            assert step.data[tensor.entry]["site"]["module"] == "model.layers.1.post_attention_layernorm"
            assert tensor.record["shape"] == [128]
    # Not in inputs: operators that write their output into a buffer are given what happens to lie there.
    outputs = [[each for each in step.tensors() if each.position.startswith("output")] for step in steps]
    bad = [[tensor.entry for tensor in tensors if tensor.record.get("nan_count")] for tensors in outputs]
    assert bad[:2] == [[], []]
    assert bad[2][0] == steps[2].manifest["flushed"]["entry"]  # type: ignore[index]
    (said,) = (record.getMessage() for record in caplog.records if "has a NaN" in record.getMessage())
    assert said.startswith(f"step 6 has a NaN, first in {told['entry']} {told['position']} (requests: first, second)")
    assert "steps 4, 5, 6 are written to" in said
