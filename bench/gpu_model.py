"""Counts the instructions and bytes of the CUDA C++ kernels, and the least time that each of the two can take.

python -m bench.gpu_model [--write] [--phases]: prints the table, and compares it with bench/results/gpu_model.json, or
replaces that file. The exit status is 1 if the issue floor of a kernel rose by more than 5 %, or if a row takes more
barriers than its kernel's stated maximum. Targets that are missed are printed as missed.

No GPU is used and nothing is timed. nvcc compiles a kernel for sm_90a, and bench/sass.py splits the SASS into basic
blocks. The same source, compiled for the emulated GPU of tests/support/cuda_emulator, processes one row in the launch
planned for an H200, and counts how often every warp executes each source line in each call chain. A block of SASS is
executed as often as the lines that its instructions come from, divided by the number of copies that unrolling made of
them, and no more often than the blocks of its loop that lead to it. A predicated instruction counts whether or not its
predicate holds.

- Issue floor: executed instructions of all warps / (132 multiprocessors x 4 per clock x 1.98 GHz).
- Byte floor: bytes that must move / the copy bandwidth measured on an H200, 4.3 TB/s.

A kernel is slower than both floors, because it also waits: for memory, at barriers, and for other units than the
scheduler.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.sass import Block, Code, Stack, blocks_of, find_tool, kernel_frames

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "bench/results/gpu_model.json"
PROCESSORS, ISSUES_PER_CLOCK, CLOCK_HZ = 132, 4, 1.98e9
COPY_BYTES_PER_SECOND = 4.3e12
PROCESSOR_REGISTERS, PROCESSOR_THREADS = 65536, 2048
PROCESSOR_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10  # shared memory of a multiprocessor, and of it per block
ALLOWED_RISE = 1.05

# Opcodes that execute once whenever their source line does, most reliable first: a load may be hoisted, and stores may
# be merged.
MARKERS = (
    re.compile(r"MATCH|VOTE|REDUX|MUFU\.EX2|SHFL|BAR|UCGABAR|ATOM|RED"),
    re.compile(r"LDS|LDG|LD\.|STG|STS\.U"),
    re.compile(r"ST\.|STS|FLO|POPC"),
    re.compile(r""),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of the table.

    Attributes:
        op: Name of the op, and of the program in bench/gpu_counts that runs a row of it.
        header: File with the kernel, below csrc.
        instance: The variant that the program runs.
        shapes: N, V and K of every row of the table.
        bytes_of: Bytes that must move for N, V and K.
        target_ratio: The issue floor should be at most this multiple of the byte floor.
        target_ms: The most that either floor should be, in place of the ratio.
        max_barriers: The most barriers, of a block or of the cluster, that a row may take.
        threads: Threads per block.
    """

    op: str
    header: str
    instance: str
    shapes: tuple[tuple[int, int, int], ...]
    bytes_of: Callable[[int, int, int], int]
    target_ratio: float = 0.8
    target_ms: float | None = None
    max_barriers: int = 20
    threads: int = 256


LARGE_SHAPES = ((8192, 32000, 1600), (4096, 128256, 6413), (2048, 262144, 13108))
KERNELS = (
    Kernel(
        "topk_logits",
        "cuda/topk_logits.cuh",
        "cuda::topk_logits_kernel<BFloat16, true, 256>",
        LARGE_SHAPES,
        lambda n, v, k: n * (2 * v + 6 * k + 8),
        target_ratio=0.8,
        max_barriers=9,
    ),
    Kernel(
        "slim_loss",
        "cuda/slim_loss.cuh",
        "cuda::slim_loss_kernel<BFloat16, true, 256>",
        LARGE_SHAPES,
        lambda n, v, k: n * (4 * v + 6 * k + 28),
        target_ratio=0.8,
        max_barriers=5,
    ),
    Kernel(
        "sample_logits",
        "cuda/sample_logits.cuh",
        "cuda::sample_logits_kernel<BFloat16, true, 256>",
        ((512, 131072, 50), (512, 131072, 0)),  # with top-k and top-p, and of the whole row
        lambda n, v, k: n * (2 * v + 20),
        target_ms=0.025,
        max_barriers=6,
    ),
)
KERNELS_BY_OP = {kernel.op: kernel for kernel in KERNELS}
TOGETHER_RATIO = 0.8


@dataclasses.dataclass(frozen=True)
class Run:
    """Counts of the emulated GPU for a row."""

    blocks_per_row: int
    shared_bytes: int
    barriers: int  # of a thread, of the block or the cluster
    cluster_barriers: int
    executed: dict[Stack, int]  # times that a warp executed a line, over all warps


def missing_tool() -> str | None:
    """Returns a sentence with the tool that is missing; None if the model can be made."""
    if shutil.which("nvcc") is None:
        return "nvcc is needed"
    if find_tool("nvdisasm") is None:
        return "nvdisasm is needed, from the CUDA toolkit or Triton"
    for name in (compiler(), "objdump", "addr2line"):
        if shutil.which(name) is None:
            return f"{name} is needed"
    return None


def compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done.stdout + done.stderr


def compile_kernel(kernel: Kernel, csrc: Path, folder: Path) -> Code:
    source, cubin = folder / f"{kernel.op}.cu", folder / f"{kernel.op}.cubin"
    source.write_text(
        f'#include "{kernel.header}"\nusing namespace slimkernels;\n'
        f"const void* used() {{ return reinterpret_cast<const void*>(&{kernel.instance}); }}\n"
    )
    options = ("-std=c++17", "-O3", "-arch=sm_90a", "-lineinfo", "-Xptxas=-v", f"-I{csrc}")
    log = run("nvcc", *options, "-cubin", source, "-o", cubin)
    registers = int(re.findall(r"Used (\d+) registers", log)[-1])
    return Code(blocks_of(run(find_tool("nvdisasm"), "-gi", "-c", cubin), csrc), registers)


def run_emulated(kernel: Kernel, shape: tuple[int, int, int], csrc: Path, folder: Path) -> Run:
    program = folder / kernel.op
    if not program.exists():
        options = ("-std=c++17", "-O0", "-g", "-fno-omit-frame-pointer", "-no-pie", "-fsanitize-coverage=trace-pc")
        include = (f"-I{csrc}", f"-I{ROOT / 'tests/support/cuda_emulator'}")
        source = ROOT / f"bench/gpu_counts/{kernel.op}.cpp"
        # Fortified longjmp aborts on jumps between fibers.
        run(compiler(), *options, "-U_FORTIFY_SOURCE", *include, source, "-o", program)
    lines_of_block = lines_of_blocks(program, csrc)
    said = run(program, *shape, input="".join(f"{block:x}\n" for block in lines_of_block)).splitlines()
    plan = [int(word) for word in said[0].split()[1:]]
    barriers = [int(word) for word in said[1].split()[1:]]
    chains = [
        (int(total), [int(frame, 16) for frame in frames if frame != "0"])
        for total, *frames in (line.split() for line in said[2:])
    ]
    callers = sorted({frame - 1 for _, chain in chains for frame in chain[1:]})
    found = run("addr2line", "-e", program, *(f"{address:x}" for address in callers)).splitlines()
    line_of = {}
    for address, text in zip(callers, found, strict=True):
        file, line = text.split(" ")[0].rsplit(":", 1)
        line_of[address + 1] = (os.path.normpath(file), int(line) if line.isdigit() else 0)
    # A line has the largest count of its blocks; a line that is reached by several calls has the sum over them.
    by_caller: dict[tuple[int, ...], collections.Counter] = collections.defaultdict(collections.Counter)
    for total, (block, *frames) in chains:
        counts = by_caller[tuple(frames)]
        for line in lines_of_block[block]:
            counts[line] = max(counts[line], total)
    executed: collections.Counter[Stack] = collections.Counter()
    for frames, counts in by_caller.items():
        outer = kernel_frames((line_of[frame] for frame in frames), csrc)
        for line, times in counts.items():
            executed[(line, *outer)] += times
    return Run(plan[0], plan[1], barriers[0], barriers[1], dict(executed))


def lines_of_blocks(program: Path, csrc: Path) -> dict[int, set[tuple[str, int]]]:
    """Returns the kernel's source lines of every basic block of an emulated kernel, by the block's address."""
    lines: dict[int, set[tuple[str, int]]] = collections.defaultdict(set)
    current, here, is_block_next = set(), set(), False
    for text in run("objdump", "-d", "-l", "--no-show-raw-insn", program).splitlines():
        if text.endswith(">:"):  # a function, whose first block begins after its first instructions
            current, here = set(), set()
        elif place := re.match(r"(/.+):(\d+)(?: \(discriminator \d+\))?$", text):
            here = set(kernel_frames([(os.path.normpath(place[1]), int(place[2]))], csrc))
        elif instruction := re.match(r" *([0-9a-f]+):\s", text):
            if is_block_next:
                current = lines[int(instruction[1], 16)]
            is_block_next = "<__sanitizer_cov_trace_pc>" in text
            if not is_block_next:
                current |= here
    return {address: found for address, found in lines.items() if found}


def counted_stacks(stacks: Iterable[Stack], executed: dict[Stack, int]) -> dict[Stack, list[Stack]]:
    """Returns the counted stacks that each stack of the compiled code stands for.

    The compiler leaves calls out of some stacks. Such a stack stands for all counted ones that it is a part of, with
    the same innermost line.
    """
    by_line: dict[tuple[str, int], list[Stack]] = collections.defaultdict(list)
    for stack in executed:
        by_line[stack[0]].append(stack)

    def is_part(stack: Stack, of: Stack) -> bool:
        rest = iter(of)
        return all(frame in rest for frame in stack)

    return {
        stack: [stack] if stack in executed else [each for each in by_line[stack[0]] if is_part(stack, each)]
        for stack in set(stacks)
        if stack
    }


def executed_by_block(code: Code, row: Run, warps: int) -> list[float]:
    """Returns how often all warps together execute each block for one row."""
    instructions = [instruction for block in code.blocks for instruction in block.instructions]
    counted = counted_stacks((stack for _, stack in instructions), row.executed)
    copies = collections.Counter((opcode, each) for opcode, stack in instructions for each in counted.get(stack, ()))

    def by_markers(block: Block, markers: re.Pattern) -> float | None:
        counts = [
            sum(row.executed[each] / copies[opcode, each] for each in counted[stack])
            for opcode, stack in block.instructions
            if stack and markers.match(opcode)
        ]
        # A few may be attributed to another line than they come from.
        return statistics.median_high(counts) if counts else None

    known: dict[int, float] = {}
    for markers in MARKERS[:-1]:
        for block in code.blocks:
            count = by_markers(block, markers)
            if block.place not in known and count is not None:
                # Outside of loops a warp executes a block once at most.
                known[block.place] = count if block.loop else min(count, warps)
    of_loop: dict[frozenset[int] | None, float] = {None: warps}
    for block in code.blocks:
        if block.loop and block.place in known:
            of_loop[block.loop] = max(of_loop.get(block.loop, 0), known[block.place])
    by_place = {block.place: block for block in code.blocks}

    def executed(block: Block) -> float:
        count = known.get(block.place)
        if count is None:
            # Some instructions were moved here from lines that execute more or less often.
            counts = [sum(row.executed[each] for each in counted[stack]) for _, stack in block.instructions if stack]
            most = statistics.median(counts) if counts else warps
            count = min(of_loop[block.loop], most) if block.loop in of_loop else by_markers(block, MARKERS[-1]) or 0
        # In a pass through its innermost loop, a warp is here at most as often as in the blocks that lead here.
        leading = (place for place in block.dominators if place in known and by_place[place].loop == block.loop)
        return min([count, *(known[place] for place in leading)])

    return [executed(block) for block in code.blocks]


@dataclasses.dataclass(frozen=True)
class Result:
    """Figures of a kernel on a shape; every number is counted."""

    op: str
    shape: tuple[int, int, int]
    instructions_per_row: int  # warp instructions
    by_phase: dict[str, int]  # the same by the line of the outermost function of the kernel that they come from
    bytes: int
    barriers: int
    cluster_barriers: int
    registers: int
    shared_bytes: int
    blocks_per_row: int
    blocks_per_processor: int

    @property
    def issue_floor_ms(self) -> float:
        rate = PROCESSORS * ISSUES_PER_CLOCK * CLOCK_HZ
        return self.instructions_per_row * self.shape[0] / rate * 1e3

    @property
    def byte_floor_ms(self) -> float:
        return self.bytes / COPY_BYTES_PER_SECOND * 1e3

    @property
    def ratio(self) -> float:
        return self.issue_floor_ms / self.byte_floor_ms


def count(kernel: Kernel, csrc: Path = ROOT / "csrc", shapes: Iterable[tuple[int, int, int]] = ()) -> list[Result]:
    """Counts a kernel on its shapes, or on some of them."""
    csrc = csrc.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = compile_kernel(kernel, csrc, folder)
        return [
            result_of(kernel, shape, code, run_emulated(kernel, shape, csrc, folder), csrc)
            for shape in shapes or kernel.shapes
        ]


def result_of(kernel: Kernel, shape: tuple[int, int, int], code: Code, row: Run, csrc: Path) -> Result:
    warps = row.blocks_per_row * kernel.threads // 32
    phases: collections.Counter[str] = collections.Counter()
    # The outermost frame is the kernel's entry; the next is a step of its body.
    steps = {stack[-2] for block in code.blocks for _, stack in block.instructions if len(stack) > 1}
    lines = {file: (csrc / file).read_text().splitlines() for file, _ in steps}
    for block, times in zip(code.blocks, executed_by_block(code, row, warps), strict=True):
        for _, stack in block.instructions:
            file, line = stack[-2] if len(stack) > 1 else ("", 0)
            phases[lines[file][line - 1].strip() if line else ""] += times
    registers_per_block = -(-code.registers // 8) * 8 * kernel.threads
    return Result(
        kernel.op,
        shape,
        round(sum(phases.values())),
        {phase: round(times) for phase, times in phases.most_common() if times >= 1},
        kernel.bytes_of(*shape),
        row.barriers,
        row.cluster_barriers,
        code.registers,
        row.shared_bytes,
        row.blocks_per_row,
        min(
            PROCESSOR_REGISTERS // registers_per_block,
            PROCESSOR_BYTES // (row.shared_bytes + RESERVED_BYTES),
            PROCESSOR_THREADS // kernel.threads,
        ),
    )


@dataclasses.dataclass(frozen=True)
class Floors:
    """The two floors of a row of the table, and whether they are within its target."""

    name: str
    shape: tuple[int, int, int]
    issue_ms: float
    byte_ms: float
    target_ratio: float | None  # of the issue floor to the byte floor
    target_ms: float | None = None  # for the larger of the two, where there is no ratio

    @property
    def ratio(self) -> float:
        return self.issue_ms / self.byte_ms

    @property
    def is_met(self) -> bool:
        if self.target_ratio is None:
            return max(self.issue_ms, self.byte_ms) <= self.target_ms
        return self.ratio <= self.target_ratio

    @property
    def sentence(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        if self.target_ratio is None:
            larger = max(self.issue_ms, self.byte_ms)
            return f"target {verdict}: both floors <= {self.target_ms} ms, the larger is {larger:.3f} ms"
        return f"target {verdict}: issue floor <= {self.target_ratio} of the byte floor, is {self.ratio:.2f}"


def floors_of(each: Result) -> Floors:
    kernel = KERNELS_BY_OP[each.op]
    ratio = kernel.target_ratio if kernel.target_ms is None else None
    return Floors(each.op, each.shape, each.issue_floor_ms, each.byte_floor_ms, ratio, kernel.target_ms)


def floors_together(results: Iterable[Result]) -> list[Floors]:
    """Returns the floors of topk_logits and slim_loss of rows of one shape: both are read, a gradient is written."""
    issue_ms = {(each.op, each.shape): each.issue_floor_ms for each in results}
    return [
        Floors(
            "topk_logits + slim_loss",
            shape,
            issue_ms["topk_logits", shape] + issue_ms["slim_loss", shape],
            shape[0] * 6 * shape[1] / COPY_BYTES_PER_SECOND * 1e3,
            TOGETHER_RATIO,
        )
        for shape in LARGE_SHAPES
        if {("topk_logits", shape), ("slim_loss", shape)} <= issue_ms.keys()
    ]


def table(results: list[Result], phases: bool) -> list[str]:
    lines = [
        "Counted for an H200, not timed: no GPU was used.",
        "op, N x V, K | instructions a row | issue floor, byte floor, ratio | barriers, of the cluster | registers, "
        "shared bytes | blocks a row, a processor",
    ]
    for each in results:
        kernel, floors = KERNELS_BY_OP[each.op], floors_of(each)
        n, v, k = each.shape
        lines.append(
            f"{each.op} {n} x {v}, {k} | {each.instructions_per_row} | {floors.issue_ms:.3f} ms, "
            f"{floors.byte_ms:.3f} ms, {floors.ratio:.2f} | {each.barriers}, {each.cluster_barriers} | "
            f"{each.registers}, {each.shared_bytes} | {each.blocks_per_row}, {each.blocks_per_processor}"
        )
        if phases:
            lines += [f"    {times:8} {phase}" for phase, times in each.by_phase.items() if times]
        verdict = "met" if each.barriers <= kernel.max_barriers else "MISSED"
        limit = f"limit {verdict}: at most {kernel.max_barriers} barriers a row, has {each.barriers}"
        lines += [f"  {floors.sentence}", f"  {limit}"]
    for floors in floors_together(results):
        n, v, k = floors.shape
        lines += [
            f"{floors.name} {n} x {v}, {k} | | {floors.issue_ms:.3f} ms, {floors.byte_ms:.3f} ms, {floors.ratio:.2f}",
            f"  {floors.sentence}",
        ]
    return lines


def committed_results(path: Path = COMMITTED) -> list[Result]:
    """Reads the committed figures."""
    return [Result(**row | {"shape": tuple(row["shape"])}) for row in json.loads(path.read_text())]


def markdown_table(results: list[Result]) -> str:
    """Returns the figures as the table of docs/speed.md."""
    lines = [
        "| op | N x V | K | instructions a row | to issue them | to move the bytes | ratio | target | barriers a row |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]

    def line(floors: Floors, instructions: str, barriers: str) -> str:
        n, v, k = floors.shape
        target = f"{floors.target_ms} ms" if floors.target_ratio is None else f"ratio {floors.target_ratio}"
        names = " + ".join(f"`{name}`" for name in floors.name.split(" + "))
        return (
            f"| {names} | {n} x {v} | {k or 'all'} | {instructions} | "
            f"{floors.issue_ms:.3f} ms | {floors.byte_ms:.3f} ms | {floors.ratio:.2f} | "
            f"{target}, {'met' if floors.is_met else 'missed'} | {barriers} |"
        )

    for each in results:
        at_most = KERNELS_BY_OP[each.op].max_barriers
        lines.append(line(floors_of(each), str(each.instructions_per_row), f"{each.barriers} of {at_most}"))
    lines += [line(floors, "", "") for floors in floors_together(results)]
    return "\n".join(lines)


def rises(results: Iterable[Result], committed: Iterable[dict]) -> list[str]:
    """Returns a sentence for every issue floor above the committed one by more than is allowed, or without one."""
    known = {(row["op"], tuple(row["shape"])): row["instructions_per_row"] for row in committed}
    found = []
    for each in results:
        before = known.get((each.op, each.shape))
        if before is None:
            found.append(f"{each.op} {each.shape} is not in {COMMITTED.name}; run with --write")
        elif each.instructions_per_row > ALLOWED_RISE * before:
            found.append(
                f"{each.op} {each.shape}: instructions a row rose from {before} to {each.instructions_per_row}"
            )
    return found


def broken_limits(results: Iterable[Result]) -> list[str]:
    """Returns a sentence for every kernel with more barriers per row than are allowed."""
    return [
        f"{each.op} {each.shape}: {each.barriers} barriers a row, at most {KERNELS_BY_OP[each.op].max_barriers} allowed"
        for each in results
        if each.barriers > KERNELS_BY_OP[each.op].max_barriers
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the committed figures")
    parser.add_argument("--phases", action="store_true", help="also print the instructions by step of a kernel")
    options = parser.parse_args(arguments)
    if (missing := missing_tool()) is not None:
        parser.error(missing)
    results = [result for kernel in KERNELS for result in count(kernel)]
    print("\n".join(table(results, options.phases)))
    if options.write:
        rows = [json.dumps(dataclasses.asdict(each)) for each in results]
        COMMITTED.write_text("[\n" + ",\n".join(rows) + "\n]\n")
    problems = rises(results, json.loads(COMMITTED.read_text())) + broken_limits(results)
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
