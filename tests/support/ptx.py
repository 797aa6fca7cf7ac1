"""Reads PTX: which accesses of memory no barrier separates, and how wide they are.

A Triton kernel is compiled to PTX for GPUs that are not present, see ``triton_aot``. A thread's accesses follow the
control flow of the text; threads of other warps see them in order only across ``bar.sync``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from support.triton_aot import Compiled

_ACCESS = re.compile(r"\b(ld|st)\.global\S*")
_NARROW_PRODUCT = re.compile(r"\b(mul|mad)\.lo\.[su]32|\bshl\.b32")


class Access(NamedTuple):
    """A load from or a store to global memory.

    Attributes:
        kind: "ld" or "st".
        opcode: The whole opcode, such as ``ld.global.v4.b32``.
        position: Index of the instruction in the kernel.
        parameters: Indices of the kernel's 64-bit parameters that its address is computed from.
    """

    kind: str
    opcode: str
    position: int
    parameters: frozenset[int]

    @property
    def num_bytes(self) -> int:
        """Bytes that one thread accesses at once."""
        vector = re.search(r"\.v(\d+)", self.opcode)
        return int(re.search(r"\.[a-z](\d+)$", self.opcode)[1]) // 8 * (int(vector[1]) if vector else 1)


class Kernel:
    """The instructions of a compiled kernel, their order, and its accesses of global memory."""

    def __init__(self, compiled: Compiled) -> None:
        self._names = compiled.parameters
        text = re.sub(r"//[^\n]*", "", compiled.assembly)
        head, body = text.split(".entry", 1)[1].split("\n{", 1)
        wide = re.findall(r"\.param\s+\.u64[^,)]*?(\w+_param_(\d+))", head)
        self._parameters = {name: int(index) for name, index in wide}
        pieces = re.findall(r"(\$\w+):|([^;{}\n][^;\n]*);", body[: body.rindex("}")])
        self._labels: dict[str, int] = {}
        self._instructions: list[str] = []
        for label, instruction in pieces:
            if label:
                self._labels[label] = len(self._instructions)
            elif not instruction.strip().startswith("."):
                self._instructions.append(instruction.strip())
        self._writers: dict[str, list[int]] = {}
        for position, instruction in enumerate(self._instructions):
            for register in self._written(instruction):
                self._writers.setdefault(register, []).append(position)
        self.accesses = [
            Access(match[1], match[0], position, self._origins(instruction))
            for position, instruction in enumerate(self._instructions)
            if (match := _ACCESS.search(instruction))
        ]

    def parameters(self, *names: str) -> list[int]:
        """Returns the indices of parameters by the names that they have in Triton."""
        return [self._names.index(name) for name in names]

    def of(self, kind: str, parameter: int) -> list[Access]:
        """Returns the loads or stores through a pointer parameter."""
        return [access for access in self.accesses if access.kind == kind and parameter in access.parameters]

    def scratch(self) -> set[int]:
        """Returns the pointer parameters that the kernel both writes and reads."""
        return set.intersection(
            *({p for a in self.accesses if a.kind == kind for p in a.parameters} for kind in ("ld", "st"))
        )

    def unordered(self, first: str, second: str, parameter: int) -> list[tuple[Access, Access]]:
        """Returns the pairs of accesses of these kinds, through one pointer, with a path of no barrier between them."""
        later = {access.position: access for access in self.of(second, parameter)}
        pairs = []
        for access in self.of(first, parameter):
            reached = self._reached_without_barrier(access.position)
            pairs += [(access, later[position]) for position in sorted(reached & later.keys())]
        return pairs

    def narrow_products(self) -> list[str]:
        """Returns the 32-bit products of the program's index that addresses are computed from.

        The index is that of a row, and its product with the row's length is larger than 32 bits hold.
        """
        found = set()
        for access in self.accesses:
            for position in self._computed_from(self._address(self._instructions[access.position])):
                product = self._instructions[position]
                # Random bits are products by constants of nine digits and more, of which 32 bits are kept on purpose.
                if _NARROW_PRODUCT.search(product) and not re.search(r", -?\d{9,};?$", product):
                    operands = self._computed_from(re.findall(r"%\w+", product)[1:])
                    if any("%ctaid" in self._instructions[each] for each in operands):
                        found.add(product)
        return sorted(found)

    def _computed_from(self, registers: list[str]) -> set[int]:
        """Returns the instructions that registers are computed by, back to what was read from memory."""
        todo, seen, found = list(registers), set(), set()
        while todo:
            register = todo.pop()
            if register in seen:
                continue
            seen.add(register)
            for position in self._writers.get(register, []):
                found.add(position)
                if not re.search(r"\bld\.", self._instructions[position]):
                    todo += [each for each in re.findall(r"%\w+", self._instructions[position]) if each != register]
        return found

    @staticmethod
    def _address(access: str) -> list[str]:
        return re.findall(r"%\w+", re.search(r"\[([^\]]*)\]", access)[1])

    def _reached_without_barrier(self, position: int) -> set[int]:
        seen: set[int] = set()
        todo = self._successors(position)
        while todo:
            here = todo.pop()
            if here in seen or "bar.sync" in self._instructions[here] or "barrier.sync" in self._instructions[here]:
                continue
            seen.add(here)
            todo += self._successors(here)
        return seen

    def _successors(self, position: int) -> list[int]:
        instruction = self._instructions[position]
        following = [position + 1] if position + 1 < len(self._instructions) else []
        if re.search(r"\bbra\b", instruction):
            target = self._labels[re.search(r"(\$\w+)", instruction)[1]]
            return [target, *following] if instruction.startswith("@") else [target]
        if re.search(r"\b(ret|trap|exit)\b", instruction) and not instruction.startswith("@"):
            return []
        return following

    def _origins(self, access: str) -> frozenset[int]:
        """Follows the address of an access back to the parameters that it is computed from."""
        found = set()
        todo = self._address(access)
        seen: set[str] = set()
        while todo:
            register = todo.pop()
            if register in seen:
                continue
            seen.add(register)
            for position in self._writers.get(register, []):
                instruction = self._instructions[position]
                parameter = re.search(r"\bld\.param\S*\s.*\[(\w+)", instruction)
                if parameter:
                    found |= {index for name, index in self._parameters.items() if name == parameter[1]}
                elif not re.search(r"\bld\.", instruction):  # what memory holds is no part of an address
                    todo += [r for r in re.findall(r"%rd\d+", instruction) if r != register]
        return frozenset(found)

    @staticmethod
    def _written(instruction: str) -> list[str]:
        without_guard = re.sub(r"^@!?%\w+\s+", "", instruction)
        operation, _, operands = without_guard.partition(" ") if " " in without_guard else without_guard.partition("\t")
        if operation.startswith(("st.", "bra", "bar", "ret", "@", "atom", "red")):
            return []
        vector = re.match(r"\s*\{([^}]*)\}", operands)
        return re.findall(r"%\w+", vector[1]) if vector else re.findall(r"%\w+", operands.split(",")[0].split("|")[0])
