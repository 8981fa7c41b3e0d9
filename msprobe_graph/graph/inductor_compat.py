"""The running scheduler, as the exact pass sees it and puts its taps in. Private Inductor, tested with torch 2.13.

What follows from how Inductor works, and not from its interfaces, is told where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import fx
from torch._inductor import custom_graph_pass, ir, lowering, scheduler
from torch._inductor.virtualized import V
from torch.utils import _pytree as pytree
from torch.utils._ordered_set import OrderedSet

from .inductor_storages import Storages
from .inductor_views import Hole, strided
from .tap_op import KEEP, NOTE, TAP, hold, tap, tap_standing

# torch 2.11 takes any callable; its caches tell our passes by post_grad_custom_post_pass alone.
SchedulerPass: Any = getattr(custom_graph_pass, "CustomSchedulerPass", object)

CALLED = "msprobe_graph_"
"""What the names begin with under which generated Python has what taps do."""

GraphKind = Literal["inference", "forward", "backward"]


class Unsupported(RuntimeError):
    """This torch's Inductor lacks something that the exact pass needs."""


def check() -> None:
    """Raise Unsupported, naming what is missing, unless this torch's Inductor is as the exact pass needs it."""
    needed: list[tuple[Any, str]] = [
        (torch._inductor.config, "_post_fusion_custom_pass"),
        (torch._inductor.config, "post_grad_custom_post_pass"),
        (scheduler.Scheduler, "compute_last_usage"),
        (scheduler.Scheduler, "create_scheduler_node"),
        (scheduler.NodeUser, "get_name"),
        (scheduler.BaseSchedulerNode, "get_outputs"),
        (scheduler.SchedulerBuffer, "get_mutations"),
        (scheduler.SchedulerBuffer, "get_aliases"),
        (ir, "FallbackKernel"),
        (ir, "ReinterpretView"),
        (ir, "NonOwningLayout"),
        (ir, "MutationLayoutSHOULDREMOVE"),
        (lowering, "register_lowering"),
    ]
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in needed if not hasattr(owner, name)]
    if missing:
        raise Unsupported(f"torch {torch.__version__}: Inductor has no {', '.join(missing)}; use fidelity 'full'")


@lowering.register_lowering(KEEP, type_promotion_kind=None)
def _keep() -> None:
    """GraphLowering is an fx.Interpreter that forgets what each node became after its last use: not this time."""
    V.graph.garbage_collect_values = False


@lowering.register_lowering(NOTE, type_promotion_kind=None)
def _note(note: str) -> None:
    """On a device, which an operator without tensors has not. Else the CPU's code generator would not end the function
    that it packs nodes into, and free what this function reads before it is called."""
    ir.FallbackKernel(ir.NoneLayout(device=torch.device("cpu")), NOTE, [], [note], lambda _, constants: (constants, {}))


def running_graph() -> tuple[fx.Graph, GraphKind] | None:
    """The aten graph that is being compiled; None for the inner graphs of control flow and higher-order operators."""
    graph = V.graph
    if hasattr(graph, "parent"):
        return None
    kind: GraphKind = "inference" if graph.is_inference else "backward" if graph.is_backward else "forward"
    return graph.graph, kind


def before_last_usage(insert: Callable[[Schedule], None]) -> None:
    """Have `insert` called when all decisions about the running scheduler's nodes are made, and before it is computed
    which of them is the last to use a buffer."""
    running = V.graph.scheduler
    compute = running.compute_last_usage

    def compute_last_usage() -> None:
        insert(Schedule(running))
        compute()

    running.compute_last_usage = compute_last_usage  # type: ignore[method-assign]


class Buffered(NamedTuple):
    """A value in memory that the compiled program puts there anyway."""

    name: str
    """Of the buffer."""
    view: ir.IRNode
    """The value in that buffer, in its logical shape."""
    begin: int
    """The first place where it is there: a tap may come before the node of this index."""
    end: int
    """The last such place: the node of this index may overwrite it."""
    foreign: bool = False
    """Whether the memory is given to the program, or comes from an operator outside of aten: it may be the same each
    time."""

    @property
    def device(self) -> torch.device:
        return self.view.get_device_or_error()


class Tap(NamedTuple):
    """A tap that is to be put in."""

    place: int
    device: torch.device
    ids: Sequence[int]
    until: int | None = None
    """The place up to which its values are standing; None where they are not."""


_UNINITIALISED = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class Schedule:
    """The running scheduler's nodes in the order in which code is generated for them. A *place* is an index of them: a
    tap at place k comes right before node k, or at the end."""

    def __init__(self, running: scheduler.Scheduler) -> None:
        self._scheduler = running
        self.nodes = list(running.nodes)
        self._owner = {part.get_name(): at for at, node in enumerate(self.nodes) for part in node.get_nodes()}
        self._storage = Storages(self.nodes)
        self._order = {node: at for at, node in enumerate(V.graph.graph.nodes)}
        self._rewritten = {
            argument
            for node in V.graph.graph.nodes
            if node.target in (torch.ops.aten.copy_.default, torch.ops.aten.fill_.Scalar)
            for argument in node.args[:1]
        }

        self._givers = [at for at, node in enumerate(self.nodes) if any(_gives(part.node) for part in node.get_nodes())]
        self._fallbacks = {
            node.node.fx_node: node.node for node in self.nodes if isinstance(node.node, ir.FallbackKernel)
        }

    @property
    def has_streams(self) -> bool:
        """Whether the program computes on other streams than the one that it is called on."""
        return bool(getattr(self._scheduler, "_multi_stream_nodes", False))

    def names(self) -> list[str]:
        """Fused nodes by name."""
        return [node.get_name() for node in self._scheduler.nodes]

    def locate(self, node: fx.Node, after: fx.Node) -> Buffered | Hole:
        """Where in memory the value of an FX node is, as `after` has left it."""
        if node in self._rewritten:
            # Inductor lets what was lowered for the node point to the new value.
            return Hole("overwritten")
        box = V.graph.env.get(node)
        if not isinstance(box, ir.TensorBox):
            return Hole("not_strided")
        view = strided(box)
        if isinstance(view, Hole):
            view = next(self._handed_over(node, box), view)
        if isinstance(view, Hole):
            return view
        name = view.get_name()
        if after.target in _UNINITIALISED:
            return Hole("uninitialised")
        if any(size == 0 for size in view.get_size()):
            return Hole("empty")
        return self._timed(name, view, self._order[after])

    def _handed_over(self, node: fx.Node, box: ir.TensorBox) -> Iterator[ir.IRNode]:
        """What operators that Inductor does not generate get of the value: it may have been computed for them alone,
        while others compute it anew."""
        for user in node.users:
            kernel = self._fallbacks.get(user)
            leaves = pytree.tree_leaves({"args": user.args, "kwargs": user.kwargs})
            given = [leaf for leaf in leaves if isinstance(leaf, fx.Node) and isinstance(V.graph.env[leaf], ir.IRNode)]
            if kernel is not None and len(given) == len(kernel.inputs):
                tensor: Any = kernel.inputs[given.index(node)]
                if isinstance(tensor, (ir.Buffer, ir.ReinterpretView)) and tensor.get_size() == box.get_size():
                    yield tensor

    def _timed(self, name: str, view: ir.IRNode, order: int) -> Buffered | Hole:
        known = self._scheduler.name_to_buf
        if name in V.graph.removed_buffers or not (name in known or name in V.graph.graph_inputs):
            return Hole("constant" if name in V.graph.constants else "fused")
        names = self._storage.of(name)
        begin, end = 0, len(self.nodes)
        blank = False
        if name in known:
            operation = known[name].defining_op
            if operation is None or operation.get_name() not in self._owner:
                return Hole("fused")
            begin = self._owner[operation.get_name()] + 1
            if not self._read_outside(names, begin - 1):
                return Hole("fused")
            made = known[name].node.get_origin_node()
            blank = made is not None and made.target in _UNINITIALISED
        for at, written in self._storage.mutations(names):
            if written is None:
                return Hole("overwritten")
            if self._order[written] <= order:
                begin, blank = max(begin, at + 1), False
            else:
                end = min(end, at)
        if blank:  # the value is a view of it
            return Hole("uninitialised")
        end = min(end, self._reused(names, end))
        given = not names.isdisjoint(V.graph.graph_inputs)
        returned = any(_gives(known[other].node) for other in names if other in known)
        if returned:  # the next such operator may return this memory
            end = min(end, next((at for at in self._givers if at >= begin), end))
        return Buffered(name, view, begin, end, given or returned) if begin <= end else Hole("overwritten")

    def _read_outside(self, names: set[str], owner: int) -> bool:
        """Whether anything but the fused node at `owner` reads the storage, or a mutation pins it in memory."""
        running = self._scheduler
        if any(name in running.mutation_renames or name in running.mutation_real_name for name in names):
            return True
        return any(
            isinstance(user.node, scheduler.OutputNode) or self._owner.get(user.get_name(), owner) != owner
            for user in self._users(names)
            if not user.is_weak
        )

    def _users(self, names: set[str]) -> Iterator[scheduler.NodeUser]:
        for name in names:
            buffer = self._scheduler.name_to_buf.get(name) or self._scheduler.name_to_donated_buffer.get(name)
            if buffer is not None:
                yield from buffer.users

    def _reused(self, names: set[str], end: int) -> int:
        """The place of the node that may write its result in place of the storage: of its readers only the last can,
        and never if the graph returns it."""
        users = [user for user in self._users(names) if user.get_name() not in V.graph.removed_operations]
        if any(isinstance(user.node, scheduler.OutputNode) for user in users):
            return end
        last = max((self._owner.get(user.get_name(), -1) for user in users), default=-1)
        if any(user.can_inplace and self._owner.get(user.get_name(), -1) == last for user in users):
            return min(end, last)
        return end

    def stops(self, place: int) -> bool:
        """Whether the code generator begins a new function at this place anyway: the CPU's packs neighbouring nodes
        into one function, which an operator in between would split."""
        if place == len(self.nodes):
            return True
        node = self.nodes[place]
        return bool(node.is_extern() or node.is_template())

    def is_free(self, place: int) -> bool:
        """Whether an operator at this place splits no function: besides where it stops, right behind a call."""
        if self.stops(place):
            return True
        before = place - 1
        while before >= 0 and isinstance(self.nodes[before], scheduler.NopKernelSchedulerNode):
            before -= 1
        if before < 0:
            return True
        node, following = self.nodes[before], self.nodes[place]
        devices = [each.get_device() for each in (node, following)]
        return bool(
            node.is_extern()
            or node.is_template()
            or all(device is not None and device.type != "cpu" for device in devices)
        )

    def written(self) -> set[torch.device]:
        """The devices on which the program writes into what it was given."""
        given = (V.graph.graph_inputs[name] for name in V.graph.mutated_inputs)
        devices = (each.get_device() for each in given if isinstance(each, ir.IRNode))
        return {device for device in devices if device is not None}

    def insert(self, taps: Sequence[Tap], values: Mapping[int, Buffered], note: str) -> None:
        """Put tap operators in, the `note` with the first. Those at one place keep their order."""
        at: dict[int, list[scheduler.BaseSchedulerNode]] = {}
        for number, (place, device, ids, until) in enumerate(taps):
            buffered = [values[id] for id in ids]
            does = tap if until is None else tap_standing
            at.setdefault(place, []).append(self._tap(does, device, buffered, ids, note if number == 0 else ""))
        for _, device, ids, until in taps:  # behind the taps that end it
            if until is not None and not V.graph.cpp_wrapper:  # for which no value is standing
                at.setdefault(until, []).append(self._tap(hold, device, [values[id] for id in ids], [], ""))
        nodes: list[scheduler.BaseSchedulerNode] = []
        for place in range(len(self.nodes) + 1):
            nodes += at.get(place, [])
            nodes += self.nodes[place : place + 1]
        self._scheduler.nodes = nodes

    def _tap(
        self,
        does: Callable[[Sequence[torch.Tensor], Sequence[int], str], None],
        device: torch.device,
        values: Sequence[Buffered],
        ids: Sequence[int],
        note: str,
    ) -> scheduler.BaseSchedulerNode:
        """A call of the tap operator, which generated Python makes as one of a function of tap_op. The buffers' lists
        of users are left as they are: what is decided by them while code is generated (in-place reuse) stays decided as
        it was."""
        running = self._scheduler
        kernel = ir.FallbackKernel(
            ir.NoneLayout(device=device),
            TAP,
            [value.view for value in values],
            [list(ids), note],
            lambda tensors, constants: ([list(tensors), *constants], {}),
        )
        if not V.graph.cpp_wrapper:
            name = f"{CALLED}{does.__name__}"
            V.graph.wrapper_code.add_import_once(f"from {does.__module__} import {does.__name__} as {name}")
            kernel.python_kernel_name = name
        node = running.create_scheduler_node(kernel)
        node.unmet_dependencies = OrderedSet(node.read_writes.reads)
        node.ancestors = OrderedSet()
        node.min_order = node.max_order = len(self.nodes)
        if hasattr(running, "node_to_stream"):
            running.node_to_stream[node] = 0
        name = node.get_name()
        running.name_to_node[name] = running.name_to_fused_node[name] = node
        running.name_to_buf.update((buffer.get_name(), buffer) for buffer in node.get_outputs())
        return node


def _gives(node: ir.Operation | ir.Buffer | None) -> bool:
    """Whether this is, or is a result of, what may return memory that Inductor and aten know nothing of."""
    maker = node.inputs[0] if isinstance(node, ir.MultiOutput) else node
    if isinstance(maker, ir.ExternKernelOut) or not isinstance(maker, ir.ExternKernel):
        return False
    silent = isinstance(maker.layout, ir.NoneLayout)
    return not silent and getattr(maker.op_overload, "namespace", None) != "aten"
