"""Counts the kernels and bytes of a lazily built MLX graph, as Metal would run it. Nothing is evaluated.

MLX's CPU build has no Metal. A function is traced with ``mx.export_function``, which names every primitive, its shapes and types.
The rules by which a primitive becomes kernels are those of MLX's Metal backend (mlx/backend/metal and mlx/compile.cpp, 0.32):

- Reshape, slice, transpose and the like are views, and copy only if strides cannot express their result.
- A reduction, softmax, norm, product, gather or sort is one kernel, and more where its ``eval_gpu`` dispatches more.
- What ``mx.compile`` fuses is one kernel: elementwise primitives up to a depth of 11 and with fewer than 24 arrays.

The CPU build expands compiled functions and ``mx.fast`` into primitives. :class:`Marks` therefore surrounds each of their calls
by ``mx.depends`` with a tag, and :class:`Graph` puts them together again. A kernel reads each of its operands once and writes its
results once, unless a rule here says otherwise; caches of the machine are not considered.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

#: Limits of what mx.compile fuses into one kernel (mlx/compile.cpp).
MAX_DEPTH, MAX_ARRAYS = 11, 24

_VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
_NOT_FUSED = {
    "AddMM", "Arange", "ArgPartition", "ArgReduce", "ArgSort", "Concatenate", "Gather", "GatherAxis", "GatherMM", "GatherQMM",
    "LogSumExp", "Matmul", "Pad", "Partition", "QuantizedMatmul", "RandomBits", "Reduce", "Scan", "Scatter", "ScatterAxis",
    "SliceUpdate", "Softmax", "Sort",
}  # fmt: skip


@dataclass
class Array:
    """Shape, type and strides (in items) of an array that does not exist."""

    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]
    computed: bool = True

    @classmethod
    def rows(cls, shape: Sequence[int], dtype: Any) -> "Array":
        """A row-contiguous array."""
        return cls(tuple(shape), dtype, _contiguous(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory behind it; broadcast dimensions count once."""
        present = (length for length, stride in zip(self.shape, self.strides, strict=True) if stride)
        return math.prod(present) * self.dtype.size

    @property
    def in_rows(self) -> bool:
        return all(
            length == 1 or stride == expected
            for length, stride, expected in zip(self.shape, self.strides, _contiguous(self.shape), strict=True)
        )

    @property
    def dense(self) -> bool:
        """Whether it is all of a block of memory, in any order of the dimensions."""
        expected = 1
        for stride, length in sorted(
            (stride, length) for length, stride in zip(self.shape, self.strides, strict=True) if length != 1
        ):
            if stride != expected:
                return False
            expected *= length
        return True


@dataclass(frozen=True)
class Kernel:
    """One kind of work: ``kernels`` dispatches that read and write ``nbytes`` together."""

    name: str
    kernels: int
    nbytes: int
    flops: int
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class Marks:
    """Marks the calls of compiled functions and of ``mx.fast``, so that a trace shows where they begin and end."""

    labels: list[str] = field(default_factory=list)
    _inside: int = 0

    @contextmanager
    def here(self) -> Iterator[None]:
        """Replace ``mx.compile``, ``mx.fast`` and ``mx.eval`` by functions that mark or do nothing.

        Modules that compile functions must be imported in here. Every function that they compile keeps its marks.
        """
        fast = ("rms_norm", "rope", "scaled_dot_product_attention", "metal_kernel")
        real = mx.compile, mx.eval, mx.async_eval, mx.contiguous, {name: getattr(mx.fast, name) for name in fast}
        mx.compile = self._compile  # type: ignore[assignment]
        mx.eval = mx.async_eval = lambda *_: None  # type: ignore[assignment]
        mx.contiguous = self.marked("copy", lambda array: -array)  # type: ignore[assignment]  # no trace has its own primitive
        mx.fast.rms_norm = self.marked("RMSNorm", mx.fast.rms_norm)  # type: ignore[assignment]
        mx.fast.rope = self.marked("RoPE", mx.fast.rope)  # type: ignore[assignment]
        mx.fast.scaled_dot_product_attention = self._attention(mx.fast.scaled_dot_product_attention)  # type: ignore[assignment]
        mx.fast.metal_kernel = self._metal_kernel  # type: ignore[assignment]
        try:
            yield
        finally:
            mx.compile, mx.eval, mx.async_eval, mx.contiguous = real[:4]  # type: ignore[assignment]
            for name, function in real[4].items():
                setattr(mx.fast, name, function)

    def marked(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose positional array arguments and results go through a tagged ``mx.depends``."""

        def call(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            self.labels.append(label)
            tag = mx.zeros((len(self.labels),), dtype=mx.uint8)
            places = [index for index, each in enumerate(args) if isinstance(each, mx.array)]
            given = list(args)
            for index, array in zip(places, mx.depends([args[index] for index in places], [tag]), strict=True):
                given[index] = array
            self._inside += 1
            try:
                result = function(*given, **options)
            finally:
                self._inside -= 1
            many = isinstance(result, tuple | list)
            results = mx.depends(list(result) if many else [result], [tag])
            return tuple(results) if many else results[0]

        return call

    def _compile(self, function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        return partial(self._compile) if function is None else self.marked("compiled", function)

    def _attention(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, mask: Any = None, **_: Any) -> Any:
            def run(queries: mx.array, keys: mx.array, values: mx.array, *rest: mx.array) -> mx.array:
                return real(queries, keys, values, scale=scale, mask=rest[0] if rest else mask)

            rest = [mask] if isinstance(mask, mx.array) else []
            fused = is_fused(queries, keys, causal=mask == "causal" if isinstance(mask, str) else False)
            return (self.marked("attention", run) if fused else run)(queries, keys, values, *rest)

        return call

    def _metal_kernel(self, name: str, input_names: Sequence[str], output_names: Sequence[str], **_: Any) -> Callable[..., Any]:
        def call(
            inputs: Sequence[Any], output_shapes: Sequence[Sequence[int]], output_dtypes: Sequence[Any], **_: Any
        ) -> list[mx.array]:
            def outputs(*arrays: mx.array) -> list[mx.array]:
                empty = [mx.zeros(shape, dtype=dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
                return mx.depends(empty, list(arrays))

            return list(self.marked(f"kernel {name}", outputs)(*inputs))

        return call


def is_fused(queries: mx.array, keys: mx.array, *, causal: bool) -> bool:
    """Whether Metal has, and by itself takes, a fused kernel for this attention.

    ``use_fallback`` in MLX's Metal backend, and for heads of 512 ``use_blocked_d512``, which is in the library of 0.32.4.
    """
    count, size, groups = queries.shape[2], queries.shape[3], queries.shape[1] // keys.shape[1]
    if count <= 8:
        return size in (64, 96, 128, 256, 512) and count * groups <= 32 and count <= keys.shape[2]
    return size in (64, 72, 80, 96, 128) or (causal and size == 512 and count >= 1024)


class Graph:
    """The kernels of a traced function."""

    def __init__(self, function: Callable[..., Any], arguments: Iterable[mx.array], marks: Marks) -> None:
        self.arrays: dict[str, Array] = {}
        self.kernels: list[Kernel] = []
        self._labels = marks.labels
        entries: list[dict[str, Any]] = []
        mx.export_function(entries.append, function, *arguments)
        self._read(entries)

    @property
    def count(self) -> int:
        return sum(kernel.kernels for kernel in self.kernels)

    @property
    def nbytes(self) -> int:
        return sum(kernel.nbytes for kernel in self.kernels)

    def by(self, kind: Callable[[Kernel], str]) -> dict[str, tuple[int, int]]:
        """Kernels and bytes of each kind."""
        found: dict[str, tuple[int, int]] = {}
        for kernel in self.kernels:
            count, nbytes = found.get(kind(kernel), (0, 0))
            found[kind(kernel)] = count + kernel.kernels, nbytes + kernel.nbytes
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def _read(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            if entry["type"] == "inputs":
                for name, shape, dtype in entry["inputs"]:
                    self.arrays[name] = Array.rows(shape, dtype)
            elif entry["type"] == "constants":
                for name, value in entry["constants"]:
                    self.arrays[name] = Array.rows(value.shape, value.dtype)
        primitives = [_Primitive.of(entry) for entry in entries if entry["type"] == "primitive"]
        makers = {name: primitive for primitive in primitives for name in primitive.outputs}
        groups = self._groups(primitives, makers)
        inner = {id(primitive) for group in groups.values() for primitive in group.members}
        for primitive in primitives:
            if id(primitive) in inner:
                continue
            if primitive.name == "Depends" and primitive.inputs[-1] in groups:
                self._boundary(primitive, groups[primitive.inputs[-1]])
            elif primitive.name == "Full" and primitive.outputs[0] in groups:
                self.arrays[primitive.outputs[0]] = Array.rows((0,), mx.uint8)
            else:
                self._primitive(primitive)

    def _groups(self, primitives: "Sequence[_Primitive]", makers: "dict[str, _Primitive]") -> "dict[str, _Group]":
        """The marked calls, by the name of their tag."""
        tags = {
            primitive.outputs[0]: primitive.shapes[0][0]
            for primitive in primitives
            if primitive.name == "Full" and primitive.dtypes[0] == mx.uint8 and len(primitive.shapes[0]) == 1
        }
        ends: dict[str, list[_Primitive]] = {}
        for primitive in primitives:
            if primitive.name == "Depends" and primitive.inputs[-1] in tags:
                ends.setdefault(primitive.inputs[-1], []).append(primitive)
        order = {id(primitive): index for index, primitive in enumerate(primitives)}
        users: dict[str, list[_Primitive]] = {}
        for primitive in primitives:
            for name in primitive.inputs:
                users.setdefault(name, []).append(primitive)
        groups = {}
        for tag, (first, last) in ((tag, pair) for tag, pair in ends.items() if len(pair) == 2):
            stop, members, found = set(first.outputs), [], set()
            waiting = list(last.inputs[:-1])
            while waiting:
                name = waiting.pop()
                if name in stop or name not in makers or id(makers[name]) in found:
                    continue
                found.add(id(makers[name]))
                members.append(makers[name])
                waiting += makers[name].inputs
            members.sort(key=lambda primitive: order[id(primitive)])
            while True:  # what others use too was made outside
                inside = {id(primitive) for primitive in (*members, last)}
                own = [
                    each for each in members if all(id(user) in inside for name in each.outputs for user in users.get(name, ()))
                ]
                if len(own) == len(members):
                    break
                members = own
            groups[tag] = _Group(self._labels[tags[tag] - 1], first, last, members)
        return groups

    def _boundary(self, primitive: "_Primitive", group: "_Group") -> None:
        names = primitive.inputs[:-1]
        if primitive is group.first:
            for name, output in zip(names, primitive.outputs, strict=True):
                self.arrays[output] = self.arrays[name]
            return
        given = [self.arrays[name] for name in group.first.inputs[:-1]]
        if group.label == "compiled":
            self._compiled(group)
            for name, output in zip(names, primitive.outputs, strict=True):
                self.arrays[output] = self.arrays[name]
            return
        if group.label == "RMSNorm" and not _dense_rows(given[0]):
            given[0] = self._copied(given[0], "RMSNorm")
        results = [Array.rows(shape, dtype) for shape, dtype in zip(primitive.shapes, primitive.dtypes, strict=True)]
        if group.label in ("RMSNorm", "RoPE") and given[0].dense:
            results[0].strides = given[0].strides
        if group.label == "attention" and given[0].shape[2] > 8:  # written as [B, N, heads, D]
            _, heads, count, size = results[0].shape
            results[0].strides = (heads * count * size, size, heads * size, 1)
        for output, array in zip(primitive.outputs, results, strict=True):
            self.arrays[output] = array
        self._add(group.label, 1, given, results)

    def _compiled(self, group: "_Group") -> None:
        """The kernels of a compiled function: the rules of ``compile_fuse``."""
        outputs = set(group.last.inputs[:-1])
        made = {name: primitive for primitive in group.members for name in primitive.outputs}
        users: dict[str, list[_Primitive]] = {}
        for primitive in group.members:
            for name in primitive.inputs:
                users.setdefault(name, []).append(primitive)
        taken: set[int] = set()
        sections: list[tuple[_Primitive, list[_Primitive]]] = []
        for top in reversed(group.members):
            if id(top) in taken or top.name in _NOT_FUSED or top.name in _VIEWS:
                continue
            fused: dict[int, _Primitive] = {}
            operands: set[str] = set()
            self._fuse(top, 0, top.shapes[0], fused, operands, made, users, outputs)
            taken |= set(fused)
            sections.append((top, [primitive for primitive in group.members if id(primitive) in fused]))
        section_of = {id(top): section for top, section in sections}
        for primitive in group.members:
            if id(primitive) in section_of:
                self._section(primitive, section_of[id(primitive)], outputs, made)
            elif id(primitive) not in taken:
                self._primitive(primitive)

    def _fuse(
        self,
        primitive: "_Primitive",
        depth: int,
        shape: tuple[int, ...],
        fused: "dict[int, _Primitive]",
        operands: set[str],
        made: "dict[str, _Primitive]",
        users: "dict[str, list[_Primitive]]",
        outputs: set[str],
    ) -> None:
        name = primitive.outputs[0]
        broadcast = primitive.name in ("Broadcast", "BroadcastAxes")
        fusable = (primitive.name not in _NOT_FUSED and primitive.name not in _VIEWS) or broadcast
        within = all(id(user) in fused for user in users.get(name, ())) or not depth
        if id(primitive) in fused:
            return
        if depth >= MAX_DEPTH or not fusable or (name in outputs and primitive.shapes[0] != shape) or not (within or broadcast):
            operands.add(name)
            return
        if name in outputs:
            operands.add(name)
        else:
            operands.discard(name)
        if len(operands) >= MAX_ARRAYS:
            return
        fused[id(primitive)] = primitive
        for each in primitive.inputs:
            if each in made:
                self._fuse(made[each], depth + 1, shape, fused, operands, made, users, outputs)
            else:
                operands.add(each)

    def _section(self, top: "_Primitive", section: "list[_Primitive]", outputs: set[str], made: "dict[str, _Primitive]") -> None:
        inside = {name for primitive in section for name in primitive.outputs}
        reads = list(dict.fromkeys(name for primitive in section for name in primitive.inputs if name not in inside))
        written = [
            (name, shape, dtype)
            for primitive in section
            for name, shape, dtype in zip(primitive.outputs, primitive.shapes, primitive.dtypes, strict=True)
            if name in outputs or primitive is top
        ]
        for name in reads:
            if name not in self.arrays:  # a broadcast that is fused here and in another section
                self._primitive(made[name])
        given = [self.arrays[name] for name in reads]
        whole = [array for array in given if array.size == math.prod(top.shapes[0])]
        same = bool(whole) and all(array.dense and array.strides == whole[0].strides for array in whole)
        for name, shape, dtype in written:
            self.arrays[name] = Array.rows(shape, dtype)
            if same and tuple(shape) == whole[0].shape:
                self.arrays[name].strides = whole[0].strides
        self._add("compiled", 1, given, [self.arrays[name] for name, *_ in written])

    def _primitive(self, primitive: "_Primitive") -> None:
        given = [self.arrays[name] for name in primitive.inputs]
        if primitive.name in _VIEWS:
            self._view(primitive, given)
            return
        results = [Array.rows(shape, dtype) for shape, dtype in zip(primitive.shapes, primitive.dtypes, strict=True)]
        for name, array in zip(primitive.outputs, results, strict=True):
            self.arrays[name] = array
        rule = _RULES.get(primitive.name)
        if rule is not None:
            rule(self, primitive, given, results)
            return
        if primitive.name == "AsType" and given[0].dtype == results[0].dtype:
            results[0].strides = given[0].strides
            return
        whole = [array for array in given if array.size == results[0].size and array.size > 1]
        if whole and all(array.dense and array.strides == whole[0].strides for array in whole):
            results[0].strides = whole[0].strides
        self._add(primitive.name, 1, given, results)

    def _view(self, primitive: "_Primitive", given: list[Array]) -> None:
        source, arguments = given[0], primitive.arguments
        for index, (name, shape, dtype) in enumerate(zip(primitive.outputs, primitive.shapes, primitive.dtypes, strict=True)):
            strides: tuple[int, ...] | None
            if primitive.name == "Depends":
                self.arrays[name] = given[index]
                continue
            if primitive.name == "Transpose":
                strides = tuple(source.strides[axis] for axis in arguments[0])
            elif primitive.name in ("Broadcast", "BroadcastAxes"):
                added = len(shape) - len(source.shape)
                strides = tuple(
                    0 if axis < added or (source.shape[axis - added] == 1 and shape[axis] != 1) else source.strides[axis - added]
                    for axis in range(len(shape))
                )
            elif primitive.name == "Slice":
                strides = tuple(stride * step for stride, step in zip(source.strides, arguments[2], strict=True))
            elif primitive.name in ("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"):
                strides = _reshaped(source, shape)
                if strides is None:
                    copy = Array.rows(shape, dtype)
                    self._add(f"copy for {primitive.name}", 1, [source], [copy])
                    strides = copy.strides
            else:  # Split, Copy, StopGradient
                strides = source.strides if len(shape) == len(source.shape) else _contiguous(shape)
            self.arrays[name] = Array(tuple(shape), dtype, strides)

    def _copied(self, array: Array, why: str) -> Array:
        copy = Array.rows(array.shape, array.dtype)
        self._add(f"copy for {why}", 1, [array], [copy])
        return copy

    def _add(
        self,
        name: str,
        kernels: int,
        given: Sequence[Array],
        results: Sequence[Array],
        *,
        nbytes: int | None = None,
        flops: int = 0,
    ) -> None:
        moved = sum(array.nbytes for array in (*given, *results)) if nbytes is None else nbytes
        self.kernels.append(Kernel(name, kernels, moved, flops, tuple(array.shape for array in (*given, *results))))

    # The kernels of primitives that are not elementwise.

    def _matmul(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        operands = [array if _has_matrices(array) else self._copied(array, "Matmul") for array in given[:2]]
        flops = 2 * results[0].size * given[0].shape[-1]
        self._add(primitive.name, 1, [*operands, *given[2:]], results, flops=flops)

    def _quantized(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        rows = given[0] if given[0].in_rows else self._copied(given[0], primitive.name)
        flops, count = 2 * results[0].size * rows.shape[-1], 1
        if primitive.name == "GatherQMM":
            experts, pairs = given[1].shape[0], results[0].size // results[0].shape[-1]
            sorted_rows = rows.shape[-2] == 1 and pairs >= 16 and pairs // experts >= 4
            count = 2 if sorted_rows else 1  # the experts' offsets, then the product
            used = 1.0 if sorted_rows else min(1.0, pairs / experts)
            weights = int(sum(array.nbytes for array in given[1:4] if array.shape[0] == experts) * used)
            self._add(
                primitive.name, count, [rows, *given[1:]], results, nbytes=rows.nbytes + weights + results[0].nbytes, flops=flops
            )
            return
        height, width = rows.size // rows.shape[-1], results[0].shape[-1]
        # Few tiles of 32 x 32: the inner dimension is split, and the parts are added (qmm_splitk).
        if height > 8 and 512 // (math.ceil(width / 32) * math.ceil(height / 32)) > 1:
            count = 2
        self._add(primitive.name, count, [rows, *given[1:]], results, flops=flops)

    def _softmax(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        array = given[0] if given[0].strides[-1] == 1 and given[0].dense else self._copied(given[0], primitive.name)
        passes = 2 if primitive.name == "Softmax" and array.shape[-1] > 4096 else 1  # once for the sum, and once more to write
        self._add(primitive.name, 1, given, results, nbytes=passes * array.nbytes + results[0].nbytes)

    def _sort(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        length = given[0].shape[-1]
        blocks = math.ceil(length / 2048)  # one block is one kernel; more are merged pairwise
        count = 1 if blocks == 1 else 2 + 2 * math.ceil(math.log2(blocks))
        self._add(primitive.name, count, given, results)

    def _gather(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        indices = sum(array.nbytes for array in given[1:])
        self._add(primitive.name, 1, given, results, nbytes=indices + 2 * results[0].nbytes)  # only the rows looked up

    def _concatenate(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        self._add(primitive.name, len(given), given, results)

    def _copy_then(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        self._add(primitive.name, 2, given, results)

    def _slice_update(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        # The buffer is the only reference to its memory, and is written in place.
        self._add(primitive.name, 1, given, results, nbytes=2 * given[1].nbytes)
        results[0].strides = given[0].strides

    def _made(self, primitive: "_Primitive", given: list[Array], results: list[Array]) -> None:
        self._add(primitive.name, 1, [], results)


@dataclass
class _Primitive:
    name: str
    inputs: list[str]
    outputs: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[Any]
    arguments: Sequence[Any]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "_Primitive":
        names, shapes, dtypes = ([list(each) for each in zip(*entry["outputs"], strict=True)] or [[], [], []])[:3]
        return cls(
            entry["name"],
            [name for name, *_ in entry["inputs"]],
            names,
            [tuple(shape) for shape in shapes],
            dtypes,
            entry["arguments"],
        )


@dataclass(frozen=True)
class _Group:
    """A marked call: its label, the marks where it begins and ends, and the primitives between."""

    label: str
    first: _Primitive
    last: _Primitive
    members: Sequence[_Primitive]


_Rule = Callable[[Graph, _Primitive, list[Array], list[Array]], None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("Matmul", "AddMM"), Graph._matmul),
    **dict.fromkeys(("QuantizedMatmul", "GatherQMM"), Graph._quantized),
    **dict.fromkeys(("Softmax", "LogSumExp"), Graph._softmax),
    **dict.fromkeys(("Sort", "ArgSort", "Partition", "ArgPartition"), Graph._sort),
    **dict.fromkeys(("Gather", "GatherAxis"), Graph._gather),
    **dict.fromkeys(("Scatter", "ScatterAxis", "Pad"), Graph._copy_then),
    **dict.fromkeys(("Arange", "Full", "RandomBits"), Graph._made),
    "Concatenate": Graph._concatenate,
    "SliceUpdate": Graph._slice_update,
}


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def _has_matrices(array: Array) -> bool:
    """Whether the last two dimensions are a matrix by rows or by columns, as products take it."""
    (one, other), (height, width) = array.strides[-2:], array.shape[-2:]
    return (other == 1 and one >= width) or (one == 1 and other >= height) or 1 in (height, width)


def _dense_rows(array: Array) -> bool:
    """Whether RMSNorm takes the array as it is."""
    return array.dense and array.strides[-1] == 1 and (len(array.shape) == 1 or array.strides[-2] in (0, array.shape[-1]))


def _reshaped(array: Array, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of a reshape that copies nothing, or None."""
    groups: list[tuple[int, int]] = []
    for length, stride in zip(array.shape, array.strides, strict=True):
        if length == 1:
            continue
        if groups and groups[-1][1] == stride * length:
            groups[-1] = (groups[-1][0] * length, stride)
        else:
            groups.append((length, stride))
    strides, index = [], 0
    left = groups[0][0] if groups else 1
    for length in shape:
        if length == 1:
            strides.append(1)
            continue
        if left == 1:
            index += 1
            if index >= len(groups):
                return None
            left = groups[index][0]
        if left % length:
            return None
        left //= length
        strides.append(groups[index][1] * left)
    return tuple(strides)
