"""Reads SASS, the machine code of NVIDIA's GPUs, as nvdisasm lists it: basic blocks, loops and source lines."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

Stack = tuple[tuple[str, int], ...]  # file and line of the calls that lead to an instruction, innermost first


@dataclasses.dataclass
class Block:
    """A basic block of SASS; `place` is its number, by which the others are named."""

    place: int
    instructions: list[tuple[str, Stack]] = dataclasses.field(default_factory=list)  # opcode and where it comes from
    successors: list[int] = dataclasses.field(default_factory=list)
    loop: frozenset[int] | None = None  # blocks of the innermost loop
    dominators: frozenset[int] = frozenset()  # blocks that come before this one on every way to it, and itself


@dataclasses.dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    blocks: list[Block]
    registers: int


def find_tool(name: str) -> str | None:
    """Returns the path of nvdisasm or cuobjdump, from the CUDA toolkit or from Triton."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found or triton is None:
        return found
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" / name
    return str(bundled) if bundled.exists() else None


def kernel_frames(frames: Iterable[tuple[str, int]], csrc: Path) -> Stack:
    """Returns the frames in the kernel's own files: the emulator replaces device.cuh and staging.cuh."""
    prefix = f"{csrc}/"
    return tuple(
        (file.removeprefix(prefix), line)
        for file, line in frames
        if file.startswith(prefix) and not file.endswith(("/device.cuh", "/staging.cuh"))
    )


def blocks_of(listing: str, csrc: Path) -> list[Block]:
    """Splits the listing of one kernel into basic blocks and finds their innermost loops."""
    blocks: list[Block] = []
    labels: dict[str, int] = {}
    targets: dict[int, str] = {}
    pending: list[str] = []
    frames: list[tuple[str, int]] = []
    in_code = in_frames = ends_block = falls_through = False
    stack: Stack = ()
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+(\S+?),", line):
            in_code = section[1].startswith(".text")
        elif not in_code:
            continue
        elif label := re.match(r"(\.L_x_\d+):", line):
            pending.append(label[1])
        elif frame := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            frames = [*(frames if in_frames else ()), (os.path.normpath(frame[1]), int(frame[2]))]
            in_frames = True
        elif found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if in_frames:
                stack = kernel_frames(frames, csrc)
            in_frames = False
            if pending or ends_block or not blocks:
                if blocks and falls_through:
                    blocks[-1].successors.append(len(blocks))
                labels |= dict.fromkeys(pending, len(blocks))
                blocks.append(Block(len(blocks)))
            pending = []
            is_conditional, opcode = bool(found[2]), found[3]
            if found[2] == "@!PT ":
                opcode = "NOP"  # never takes effect, so it tells nothing about its line
            blocks[-1].instructions.append((opcode, stack))
            # BRA.DIV leads to a copy of what follows for warps whose lanes are at different places; here they are not.
            ends_block = opcode.startswith(("BRA", "EXIT", "RET")) and opcode != "BRA.DIV"
            falls_through = not ends_block or is_conditional or ", `(" in found[4]
            if opcode.startswith("BRA") and ends_block:
                targets[len(blocks) - 1] = re.search(r"`\((\.L_x_\d+)\)", found[4])[1]
    for place, target in targets.items():
        blocks[place].successors.append(labels[target])
    return find_loops(blocks)


def find_loops(blocks: list[Block]) -> list[Block]:
    """Returns the blocks that can be reached, with their innermost loops: those of the fewest blocks."""
    before: dict[int, set[int]] = {0: set()}
    waiting = [0]
    while waiting:
        here = waiting.pop()
        for after in blocks[here].successors:
            if after not in before:
                before[after] = set()
                waiting.append(after)
            before[after].add(here)
    # A block dominates those that cannot be reached without it.
    dominators = {place: set(before) for place in before} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for place in sorted(before)[1:]:
            found = set.intersection(*(dominators[each] for each in before[place])) | {place}
            changed = changed or found != dominators[place]
            dominators[place] = found
    for place in before:
        blocks[place].dominators = frozenset(dominators[place])
        for head in set(blocks[place].successors) & dominators[place]:
            body, waiting = {head}, [place]
            while waiting:
                here = waiting.pop()
                if here not in body:
                    body.add(here)
                    waiting.extend(before[here])
            for member in body:
                loop = blocks[member].loop
                if loop is None or len(body) < len(loop):
                    blocks[member].loop = frozenset(body)
    return [blocks[place] for place in sorted(before)]
