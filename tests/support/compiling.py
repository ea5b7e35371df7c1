"""Triton kernels compiled without a GPU, as they are launched. Nothing here imports Triton before it is called."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_POINTERS = {
    **{torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"},
    **{torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1"},
}


@dataclass(frozen=True)
class Launch:
    """A kernel as it was launched: its grid of programs, its arguments by name, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]

    def signature(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """Types and constants of the arguments, and the names of those that are multiples of 16, as Triton's JIT decides them."""
        types, constants, aligned = {}, {}, []
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and special):
                types[parameter.name], constants[parameter.name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                types[parameter.name] = _POINTERS[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    aligned.append(parameter.name)  # torch allocates at multiples of 512 bytes
            elif isinstance(value, float):
                types[parameter.name] = "fp32"
            else:
                types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if special and value % 16 == 0:
                    aligned.append(parameter.name)
        return types, constants, aligned

    def compiled(self, capability: int) -> Any:
        """The kernel compiled for a GPU of this compute capability, 90 for 9.0."""
        types, constants, aligned = self.signature()
        return _compiled(capability, self.kernel, types, constants, aligned, dict(self.options))


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches of a call, which are not made. Its tensors can be on torch's meta device."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        own = {name: value for name, value in named.items() if name in self.arg_names}
        others = {name: value for name, value in named.items() if name not in self.arg_names}
        found.append(Launch(self, tuple(grid), {**dict(zip(self.arg_names, arguments, strict=False)), **own}, others))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return found


def compile_for(
    capability: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    shared: int,
    aligned: Collection[str] = (),
) -> Any:
    """Compile a kernel without a GPU. Pointers, and the integers ``aligned``, are multiples of 16, as at a launch."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # Tensors are aligned. That lets Triton prefetch, which uses shared memory.
    multiples = [name for name, kind in types.items() if kind.startswith("*") or name in aligned]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = _compiled(capability, kernel, signature, constants, multiples, options)
    assert compiled.asm["cubin"], kernel
    assert compiled.metadata.shared <= shared, f"{compiled.metadata.shared} bytes of shared memory"
    return compiled


def compile_for_hopper(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3) -> Any:
    # Half of a multiprocessor's memory, so that two programs can share it.
    return compile_for(90, kernel, types, constants, warps, stages, shared=113 * 1024)


def _compiled(
    capability: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: Collection[str],
    options: dict[str, Any],
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_instructions(compiled: Any, activations: str) -> None:
    """Half precision uses only wgmma, and float32 uses no tensor core."""
    assert tensor_core_products(compiled) == ({"wgmma.mma_async"} if activations == "bf16" else set())


def tensor_core_products(compiled: Any) -> set[str]:
    """The kinds of tensor-core instructions in compiled code."""
    return {name for name in ("wgmma.mma_async", "mma.sync") if name in compiled.asm["ptx"]}


def usage(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and the bytes that it spills, from the compiled code."""
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", cuobjdump(compiled, "-res-usage"))}
    return found["REG"], found["STACK"]


def cuobjdump(compiled: Any, option: str) -> str:
    """What the program of this name, which comes with Triton, says of compiled code."""
    from triton.backends.nvidia import compiler

    program = Path(compiler.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = subprocess.run([program, option, file.name], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr
