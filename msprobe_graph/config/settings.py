"""The settings of a capture: as they may be written, and as the rest of the package reads them.

`ConfigFile` and `TaskBlock` are the written form, field by field, with msProbe's names and defaults; the JSON
Schema and the table in docs/configuration.md are made from them. `Settings` is what they come to once
`load_settings` has checked everything and flattened the task's block. To add a setting: a field in the written
form, the same in `Settings`, and, where the two differ, a line in load.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import FieldInfo

Task = Literal["statistics", "tensor"]
Level = Literal["L0", "L1", "L2", "mix", "debug"]
Precision = Literal["high", "low"]
RiskLevel = Literal["CORE", "FOCUS", "ALL"]
SummaryMode = Literal["statistics", "md5", "xor"]
DataMode = Literal["all", "forward", "backward", "input", "output"]
Trigger = Literal["nan", "inf", "request", "signal", "rpc"]

MAPPING = "<mapping>"  # the source of settings that came from no file
NUMBER_MAX = 10**6  # the largest step or rank that msProbe takes

# msProbe's other tasks, of this and earlier versions. A file may hold their blocks; they are left alone.
OTHER_TASKS = (
    "acc_check",
    "diff_check",
    "exception_dump",
    "free_benchmark",
    "grad_probe",
    "nan_check",
    "overflow_check",
    "run_ut",
    "structure",
)
# Left alone as well: msProbe's loading of earlier inputs, and the key by which editors find a JSON Schema.
LEFT_ALONE = (*OTHER_TASKS, "load", "$schema")


class ConfigError(ValueError):
    """A setting is wrong: one sentence that names the file, the key, the value and what is allowed."""


def _doc(values: str, meaning: str, default: str = "", **json_schema: Any) -> Meta:
    """What a field may hold (completes "it must be ..."), what it means, and its default where code can't say it."""
    return Meta(
        description=meaning,
        extra={"values": values, "default": default},
        extra_json_schema=json_schema or None,
    )


def field_doc(field: FieldInfo) -> Meta:
    """What `_doc` says of a field of the written form."""
    doc: Meta = field.type.__metadata__[-1]  # the outermost
    return doc


_Name = Annotated[str, Meta(min_length=1)]
_Bytes = Annotated[int, Meta(ge=1)] | Annotated[str, Meta(pattern=r"^\s*[0-9]+(\.[0-9]+)?\s*([kKMGTP]i?)?B?\s*$")]
_Numbers = tuple[
    Annotated[int, Meta(ge=0, le=NUMBER_MAX)] | Annotated[str, Meta(pattern=r"^\s*[0-9]+\s*(-\s*[0-9]+\s*)?$")], ...
]


class OperatorChanges(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a config changes in the package's operator list: `add` and `remove`, or `only` in place of both."""

    add: Annotated[
        dict[str, tuple[_Name, ...]],
        Meta(
            description="Functions to capture besides those listed, by category of the operator list or namespace of "
            "torch.ops."
        ),
    ] = {}
    remove: Annotated[
        tuple[_Name, ...], Meta(description="Operators not to capture, as they are called in a dump.")
    ] = ()
    only: Annotated[tuple[_Name, ...], Meta(min_length=1, description="Capture these and no others.")] | None = None


class Slice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a tensor is looked at along one dimension, `tensor[begin:end]` there.

    Tensors that lack the dimension are looked at whole, and so are those whose length there is not `size`.
    """

    dim: Annotated[int, Meta(ge=0, description="The dimension, counted from 0.")] = 0
    begin: Annotated[int, Meta(description="First index; a negative one counts from the end, as in Python.")] = 0
    end: Annotated[int | None, Meta(description="Index after the last; null: up to the end.")] = None
    size: Annotated[int, Meta(ge=0, description="Slice only tensors of this length there; null: of any.")] | None = None


class TaskBlock(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The block named after the task: which entries are captured, and what of them."""

    scope: Annotated[
        tuple[_Name, ...],
        _doc(
            "[] or exactly two full entry names: of modules at level L0, of operators at L1 and L2, of either at mix",
            "Capture only from the first of these entries to the second, both included, in each step. A module's name "
            "reads Module.layers.0.mlp.MLP.forward.0, an operator's Functional.linear.0.forward.",
            maxItems=2,
            **{"not": {"type": "array", "minItems": 1, "maxItems": 1}},
        ),
    ] = ()
    list: Annotated[
        tuple[_Name, ...],
        _doc(
            "a list of strings, each a part of an entry name or name-regex(...) around a valid regular expression",
            "Capture only entries whose name contains one of these strings, or matches as a whole the expression "
            "inside name-regex(...). At level mix a module that is named here is captured with all that runs inside "
            "it. [] captures all.",
        ),
    ] = ()
    tensor_list: Annotated[
        tuple[_Name, ...],
        _doc(
            "a list of strings, each a part of an entry name or name-regex(...) around a valid regular expression",
            "At task statistics: save the tensors themselves too, for these entries (named as in list).",
        ),
    ] = ()
    data_mode: Annotated[
        tuple[DataMode, ...],
        _doc(
            '["all"] or any of "forward", "backward", "input", "output"',
            'What is captured of an entry. Where neither direction is named both are, and so with the sides: ["input"] '
            "is the input of forward and of backward. [] is the same as all.",
            **{
                "if": {"type": "array", "contains": {"const": "all"}},
                "then": {"maxItems": 1},
            },
        ),
    ] = ("all",)
    summary_mode: Annotated[
        SummaryMode,
        _doc(
            'one of "statistics", "md5", "xor"',
            "What describes a tensor: its statistics; these and a CRC-32 of its bytes (which msProbe calls md5); or "
            "an XOR checksum alone.",
        ),
    ] = "statistics"
    slice: Annotated[
        tuple[Slice, ...],
        _doc(
            'a list of {"dim": 0, "begin": 0, "end": 8, "size": 16}, where dim and size are at least 0 and each key '
            "may be left out",
            "Look only at this part of every tensor: begin (default 0) up to but without end (default: the length) "
            "along dim (default 0). With size, only tensors of that length along dim are cut. Of two items for one "
            "dim the later holds.",
        ),
    ] = ()
    request_id: Annotated[
        str | None,
        _doc(
            "a string",
            "Look only at the rows of this request in the batch, in steps whose start() was told the "
            "scheduled_tokens of each request.",
            "all rows",
        ),
    ] = None


class ConfigFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The top level of a config file, less the blocks named after tasks."""

    task: Annotated[
        Task,
        _doc(
            'one of "statistics", "tensor"',
            "What is written of each tensor: its statistics, or these and the tensor itself (a .pt file).",
        ),
    ] = "statistics"
    dump_path: Annotated[
        _Name,
        _doc(
            "the path of a directory that exists or can be made",
            "Where the dump goes: step<N>/rank<R>/ below it. A relative path starts at the working directory, ~ "
            "at the home directory.",
        ),
    ]
    rank: Annotated[
        _Numbers,
        _doc(
            f'a list of numbers from 0 to {NUMBER_MAX}, each as 3, "3" or, for a range with both ends, "4-6"',
            "Ranks that capture. [] is every rank.",
        ),
    ] = ()
    step: Annotated[
        _Numbers,
        _doc(
            f'a list of numbers from 0 to {NUMBER_MAX}, each as 3, "3" or, for a range with both ends, "4-6"',
            "Steps that are captured, counted from 0. [] is every step.",
        ),
    ] = ()
    level: Annotated[
        Level,
        _doc(
            'one of "L0", "L1", "L2", "mix", "debug"',
            "What an entry is: L0 a module's call, L1 a torch API call, L2 an aten operator, mix L0 and L1, debug "
            "nothing but what save() is given.",
        ),
    ] = "L1"
    async_dump: Annotated[
        bool,
        _doc(
            "true or false",
            "msProbe's switch for holding all back on the device until the step ends. It changes nothing here: "
            "statistics are always fetched once a step, and a tensor is copied at once and written in the background.",
        ),
    ] = False
    dump_enable: Annotated[
        bool | None,
        _doc(
            "true or false",
            "Switches capture on and off in a running process: edit the file, and it is seen within a second, at the "
            "next step. Left out, capture is on and the file is never looked at again.",
            "not watched",
        ),
    ] = None
    extra_info: Annotated[
        bool,
        _doc("true or false", "Write stack.json (call stacks) and construct.json (which entry contains which)."),
    ] = True
    precision: Annotated[
        Precision,
        _doc(
            'one of "high", "low"',
            "msProbe's switch between float32 and the tensor's own dtype for statistics. Here they are always "
            "accumulated in float32 or better, so both give the same.",
        ),
    ] = "low"
    risk_level: Annotated[
        RiskLevel,
        _doc(
            'one of "CORE", "FOCUS", "ALL"',
            "Levels L1 and mix, where neither scope nor list is given: which operators. CORE those prone to "
            "numerical error, FOCUS all but such as only move or convert data, ALL all. null is ALL.",
        ),
    ] = "FOCUS"
    custom_op_namespaces: Annotated[
        tuple[_Name, ...] | None,
        _doc(
            "a list of namespaces of torch.ops",
            "Custom operators are captured of these namespaces only.",
            "every namespace but those of torch's own machinery",
        ),
    ] = None
    operators: Annotated[
        OperatorChanges,
        _doc(
            '{"add": {category: [functions]}, "remove": [names]} with either left out, or {"only": [names]}',
            "Changes to the operator list. A category is one of the list's (functional, tensor, torch) or a namespace "
            "of torch.ops. Names are as in a dump (Tensor.mul), or patterns (Tensor.*).",
            "no changes",
            **{
                "not": {
                    "type": "object",
                    "required": ["only"],
                    "properties": {"only": {"type": "array"}},
                    "anyOf": [{"required": ["add"]}, {"required": ["remove"]}],
                }
            },
        ),
    ] = OperatorChanges()
    max_bytes: Annotated[
        _Bytes | None,
        _doc(
            'a number of bytes of at least 1, as 500000000, "500MB" (powers of 1000) or "10GiB" (powers of 1024)',
            "Capture ends, and the manifest says so, when the dump reaches this. With keep_last the tensors that are "
            "kept count too, and fewer steps are kept where it is too little.",
            "four fifths of what the disk has free; with keep_last no more than half of the free memory",
        ),
    ] = None
    graph_copy_bytes: Annotated[
        _Bytes | None,
        _doc(
            'a number of bytes of at least 1, written as in max_bytes ("4GiB")',
            "Where tensors are saved inside CUDA graphs: the device's memory for copies of them, taken when the first "
            "graph is compiled. What has no room there is a hole in the manifest.",
            "2GiB, or a quarter of the device's free memory where that is less",
        ),
    ] = None
    max_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        _doc(
            "a number of at least 1",
            "Capture ends, and the manifest says so, after this many captured steps.",
            "no limit",
        ),
    ] = None
    keep_last: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        _doc(
            "a number of at least 1",
            "Keep this many of the last captured steps in memory, and write them only when something of flush_on "
            "fires.",
            "every step is written",
        ),
    ] = None
    flush_on: Annotated[
        Annotated[tuple[Trigger, ...], Meta(min_length=1)] | None,
        _doc(
            'a list of one or more of "nan", "inf", "request", "signal", "rpc", beside keep_last ("request" where '
            'request_id is given, "nan" and "inf" at another summary_mode than xor)',
            "What has the steps that are kept written: a step with a NaN or an infinity after one without, the end of "
            "the request that request_id names, SIGUSR1, a call of flush_kept().",
            '`["nan", "inf"]` with keep_last',
        ),
    ] = None
    flush_sites: Annotated[
        tuple[_Name, ...],
        _doc(
            "a list of strings, each a part of an entry name or name-regex(...) around a valid regular expression, "
            'beside keep_last and a flush_on with "nan" or "inf"',
            "Look for NaN and infinities in these entries only (named as in list). [] is every entry.",
        ),
    ] = ()


class Settings(Struct, frozen=True, kw_only=True):
    """What a capture is told to do, checked and complete. Made by `load_settings`.

    Each field means what it means in `ConfigFile` and `TaskBlock`; noted here is only what its value looks like
    where that differs.
    """

    source: str
    """Absolute path of the config file, or `MAPPING`."""
    task: Task
    dump_path: str
    """Absolute."""
    rank: frozenset[int]
    """Ranges written out; empty: every rank."""
    step: frozenset[int]
    """Ranges written out; empty: every step."""
    level: Level
    async_dump: bool
    dump_enable: bool | None
    """What the file said when it was loaded; `ConfigWatch` knows what it says now. None: never watched."""
    extra_info: bool
    precision: Precision
    risk_level: RiskLevel
    custom_op_namespaces: tuple[str, ...] | None
    """None: every namespace but those of torch's own machinery; (): none."""
    operators: OperatorChanges
    max_bytes: int | None
    """In bytes; None: the writer looks at what disk and memory have free."""
    graph_copy_bytes: int | None
    """In bytes; None: it is seen what the device has free."""
    max_steps: int | None
    """None: no limit."""
    keep_last: int | None
    """None: every step is written."""
    flush_on: tuple[Trigger, ...]
    """Empty without keep_last, and only then."""
    flush_sites: tuple[str, ...]
    """As written: see `entry_matcher`."""
    scope: tuple[str, str] | None
    list: tuple[str, ...]
    """As written: see `entry_matcher`."""
    tensor_list: tuple[str, ...]
    """As written: see `entry_matcher`."""
    data_mode: frozenset[str]
    """Expanded: a subset of {"forward", "backward", "input", "output"} with at least one direction and one side."""
    summary_mode: SummaryMode
    slice: tuple[Slice, ...]
    request_id: str | None
