"""Reads a compiled program: what it sends between devices, and what a value in it depends on.

`compiled.as_text()` is the program that one device runs, after partitioning and optimisation: what is not in it is
not sent. Only what these two questions need is parsed, from the text of XLA for CPUs and GPUs alike.

Source: the HLO text format, https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

from sharding.strategies import Collective

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

# Instructions that hand their operands to one computation and return its result.
_FUNCTIONS = ("call", "fusion")

_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%(\S+) = (.*)")
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%([\w.-]+)")
_CALL_LISTS = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of the program; all but its names is kept as text.

    Attributes:
      computation: name of the function that it is in.
      type: of the result; several arrays for a tuple.
      arguments: what is in the parentheses.
      attributes: what follows them.
    """

    computation: str
    name: str
    opcode: str
    type: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        return _NAME.findall(self.arguments)

    @property
    def calls(self) -> list[str]:
        """Names of the computations it runs: a fused one, a loop's body and condition, branches, a reducer."""
        if self.opcode.endswith(("-update", "-done")):
            return []  # named where it starts
        lists = _CALL_LISTS.findall(self.attributes)
        return _CALLS.findall(self.attributes) + _NAME.findall(" ".join(lists))

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of all arrays of the result."""
        return [_dims(dims) for _, dims in _ARRAY.findall(self.type)]

    @property
    def nbytes(self) -> int:
        """Of all arrays of the result."""
        return sum(_bits(name) * math.prod(_dims(dims)) // 8 for name, dims in _ARRAY.findall(self.type))

    @property
    def scope(self) -> str:
        """The names that the model's code gives to where it is, as in "jit(f)/while/body/mlp/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where XLA knows."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def number(self, name: str) -> int:
        """The attribute `name`."""
        return int(re.search(rf"\b{name}=(\d+)", self.attributes)[1])


@dataclasses.dataclass(frozen=True)
class Sent:
    """A collective of the program.

    Attributes:
      collective: kind, bytes of the result on each device, and devices that take part.
      loops: how often each loop around it runs, outermost first; None where XLA does not know.
      instruction: where it is.
    """

    collective: Collective
    loops: tuple[int | None, ...]
    instruction: Instruction


class Program:
    """An optimised HLO module, from the text of `compiled.as_text()`."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = defaultdict(dict)
        self._roots: dict[str, Instruction] = {}
        self._callers: dict[str, list[Instruction]] = defaultdict(list)
        self.entry = name = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.entry = name if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                instruction = _parse(name, found[2], found[3])
                self.computations[name][instruction.name] = instruction
                if found[1]:
                    self._roots[name] = instruction
                for called in instruction.calls:
                    self._callers[called].append(instruction)
        if not self.entry:
            raise ValueError("this is not the text of an HLO module: it has no ENTRY")

    def walk(self, computation: str | None = None) -> Iterator[tuple[Instruction, tuple[int | None, ...]]]:
        """Every instruction that `computation` (the whole program by default) runs, in order, and the loops around
        it; instructions of called functions follow their caller."""
        for instruction in self.computations[computation or self.entry].values():
            yield instruction, ()
            inner = (instruction.trips,) if instruction.opcode == "while" else ()
            for called in instruction.calls:
                for below, loops in self.walk(called):
                    yield below, (*inner, *loops)

    def sent(self) -> list[Sent]:
        """All collectives in the order they run. An asynchronous pair counts once."""
        return [
            Sent(Collective(kind, instruction.nbytes, self._group(instruction)), loops, instruction)
            for instruction, loops in self.walk()
            if (kind := instruction.opcode.removesuffix("-done")) in KINDS
        ]

    def sources(self, instruction: Instruction, *, within: str | None = None) -> set[Instruction]:
        """All instructions whose results flow into that of `instruction`, through loops and called functions.

        Loops carry tuples, whose elements are told apart. What a loop depends on only by how often it runs is left
        out. `within` names a computation whose parameters are not followed to what is passed in.
        """
        found, pending = set(), [(instruction, None)]
        while pending:
            value = pending.pop()
            if value in found:
                continue
            found.add(value)
            at, element = value
            if at.opcode != "parameter" or at.computation != within:
                pending += self._reads(at, element)
        return {at for at, _ in found} - {instruction}

    def _reads(self, at: Instruction, element: int | None) -> list[tuple[Instruction, int | None]]:
        """The values that one value is computed from; of a tuple, `element` alone (None: all of it)."""
        operands = [self.computations[at.computation][name] for name in at.operands]
        roots = [self._roots[name] for name in at.calls]
        if at.opcode == "get-tuple-element":
            return [(operands[0], at.number("index"))]
        if at.opcode == "tuple" and element is not None:
            return [(operands[element], None)]
        if at.opcode == "while":
            body = self._roots[re.search(r"body=%([\w.-]+)", at.attributes)[1]]
            return [(operands[0], element), (body, element)]
        if at.opcode in _FUNCTIONS:
            return [(roots[0], element)]
        if at.opcode == "parameter":
            passed = []
            for caller in self._callers[at.computation]:
                given = [self.computations[caller.computation][name] for name in caller.operands]
                if caller.opcode == "while":
                    passed += self._reads(caller, element)
                elif caller.opcode in _FUNCTIONS:
                    passed.append((given[int(at.arguments)], element))
                else:
                    passed += [(value, None) for value in given]
            return passed
        return [(value, None) for value in operands + roots]

    def _group(self, instruction: Instruction) -> int:
        """Devices of one group of a collective."""
        text = instruction.attributes
        if instruction.opcode.endswith("-done"):
            text = self.computations[instruction.computation][instruction.operands[0]].attributes
        if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
            return len(set(re.findall(r"\d+", pairs[1])))
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
            return len(listed[1].split(","))
        if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
            return int(iota[1])
        if mesh := re.search(r"replica_groups=mesh\[(.*?)\]\s*\{(.*?)\}", text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", mesh[2]))
        raise ValueError(f"cannot tell which devices take part in {instruction.name}: {text}")


def _parse(computation: str, name: str, text: str) -> Instruction:
    """An instruction from what follows its name: type opcode(arguments), attributes."""
    result, rest = _split(text) if text.startswith("(") else text.split(" ", 1)
    opcode, rest = rest.strip().split("(", 1)
    arguments, attributes = _split("(" + rest)
    return Instruction(computation, name, opcode, result, arguments[1:-1], attributes)


def _split(text: str) -> tuple[str, str]:
    """A leading parenthesis, matched, and what follows it."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced parentheses in HLO: {text}")


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bits(dtype: str) -> int:
    """Width of an element type: f32, bf16, f8e4m3fn, c64, pred, or a token, which is none."""
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 8 * (dtype == "pred")
