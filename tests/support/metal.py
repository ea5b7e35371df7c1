"""Runs the source of a Metal kernel on the CPU, compiled as C++ with stand-ins for Metal's functions.

A threadgroup's threads are threads of the system. They meet at every barrier and in every operation of a SIMD group, as on a GPU.
Threadgroups run one after the other.
"""

import ctypes
import hashlib
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

COMPILER = shutil.which("g++") or shutil.which("clang++")

_TYPES = {"float32": "float", "bfloat16": "bfloat16_t", "uint32": "unsigned", "int32": "int"}

_SHIM = """
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <memory>
#include <thread>
#include <vector>
typedef unsigned uint;
using std::max;
struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float value) {
        uint32_t word;
        std::memcpy(&word, &value, 4);
        bits = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    }
    operator float() const {
        uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
};
struct Three { uint x, y, z; };
namespace metal { namespace precise {
inline float exp(float x) { return std::exp(x); }
inline float log(float x) { return std::log(x); }
inline float tanh(float x) { return std::tanh(x); }
} }
static thread_local Three threadgroup_position_in_grid, thread_position_in_threadgroup, thread_position_in_grid;
static thread_local uint thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
static std::unique_ptr<std::barrier<>> everyone;
static std::vector<std::unique_ptr<std::barrier<>>> lanes;
static double exchanged[64][32];
enum class mem_flags { mem_threadgroup };
static void threadgroup_barrier(mem_flags) { everyone->arrive_and_wait(); }
template <typename T, typename F> static T simd(T own, F f) {
    uint group = simdgroup_index_in_threadgroup;
    exchanged[group][thread_index_in_simdgroup] = own;
    lanes[group]->arrive_and_wait();
    T result = T(exchanged[group][0]);
    for (int lane = 1; lane < 32; lane++) result = f(result, T(exchanged[group][lane]));
    lanes[group]->arrive_and_wait();
    return result;
}
template <typename T> static T simd_sum(T own) { return simd(own, [](T a, T b) { return T(a + b); }); }
template <typename T> static T simd_max(T own) { return simd(own, [](T a, T b) { return a > b ? a : b; }); }
template <typename T> static T simd_min(T own) { return simd(own, [](T a, T b) { return a < b ? a : b; }); }
#define threadgroup static
"""


def run(
    folder: Path,
    source: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, tuple[Sequence[int], str]],
    template: Mapping[str, Any],
    grid: tuple[int, int],
    group: int,
) -> dict[str, Any]:
    """Run a kernel for ``grid`` threads in groups of ``group`` along x.

    Args:
        folder: for the compiled library.
        inputs: arrays float32, uint32 or int32, or bfloat16 as uint16.
        outputs: shape and type of each.
        template: numbers, flags, and the names of types.
    """
    assert COMPILER is not None
    kinds = {name: "bfloat16" if array.dtype == np.uint16 else str(array.dtype) for name, array in inputs.items()}
    parameters = [f"const {_TYPES[kinds[name]]}* {name}" for name in inputs]
    parameters += [f"{_TYPES[kind]}* {name}" for name, (_, kind) in outputs.items()]
    constants = "".join(
        f"using {name} = {_TYPES[value]};\n" if isinstance(value, str) else f"static constexpr int {name} = {int(value)};\n"
        for name, value in template.items()
    )
    names = ", ".join([*inputs, *outputs])
    code = f"""{_SHIM}{constants}
static void kernel({", ".join(parameters)}) {{ {source} }}
extern "C" void launch(int groups, int rows, int size, {", ".join(parameters)}) {{
    everyone = std::make_unique<std::barrier<>>(size);
    for (int first = 0; first < size; first += 32) lanes.push_back(std::make_unique<std::barrier<>>(std::min(32, size - first)));
    for (int row = 0; row < rows; row++) for (int index = 0; index < groups; index++) {{
        std::vector<std::thread> threads;
        for (int own = 0; own < size; own++) threads.emplace_back([=] {{
            threadgroup_position_in_grid = {{uint(index), uint(row), 0}};
            thread_position_in_threadgroup = {{uint(own), 0, 0}};
            thread_position_in_grid = {{uint(index * size + own), uint(row), 0}};
            thread_index_in_simdgroup = own % 32;
            simdgroup_index_in_threadgroup = own / 32;
            kernel({names});
        }});
        for (auto& each : threads) each.join();
    }}
    lanes.clear();
}}
"""
    stem = folder / hashlib.sha256(code.encode()).hexdigest()[:16]
    stem.with_suffix(".cpp").write_text(code)
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"]
    command = [COMPILER, *flags, "-o", f"{stem}.so", f"{stem}.cpp"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[:4000]
    results = {name: np.zeros(shape, np.uint16 if kind == "bfloat16" else kind) for name, (shape, kind) in outputs.items()}
    arrays = [np.ascontiguousarray(array) for array in inputs.values()] + list(results.values())
    groups = math.ceil(grid[0] / group)
    ctypes.CDLL(f"{stem}.so").launch(groups, grid[1], group, *(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))
    return results
