"""PTX, as the compiler wrote it, taken apart: kernels, their registers and shared arrays, and their instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

C_TYPES = {
    "pred": "bool", "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t", "b16": "uint16_t", "u16": "uint16_t",
    "s16": "int16_t", "f16": "uint16_t", "bf16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t",
    "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t", "f32": "float", "f64": "double",
}  # fmt: skip


class UnknownPTX(ValueError):
    """PTX that nothing here knows: never passed over in silence."""


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Instruction:
    """`@!%p1 ld.global.v4.u32 {%r1, ...}, [%rd1+16];`"""

    text: str
    predicate: str  # a C++ condition, or empty
    name: str  # ld
    modifiers: tuple[str, ...]  # global, v4, u32
    operands: tuple[str, ...]
    line: int  # in the PTX: what tells two barriers apart
    source: tuple[str, int] | None  # file and line that it was compiled from


@dataclass
class Kernel:
    name: str
    parameters: dict[str, str]  # name → C type
    registers: dict[str, str] = field(default_factory=dict)  # %r1 → C type
    shared: dict[str, int] = field(default_factory=dict)  # name → bytes
    local: dict[str, int] = field(default_factory=dict)  # name → bytes
    body: list[Label | Instruction] = field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    kernels: list[Kernel]
    dynamic: frozenset[str]  # names of the dynamic shared array
    shared: dict[str, int]  # static arrays declared outside of kernels
    constants: dict[str, tuple[str, list[int]]]  # name → C type, values


def parse(text: str) -> Unit:
    text = re.sub(r"//.*", "", text)
    files = {number: path.split("/")[-1] for number, path in re.findall(r'\.file\s+(\d+) "([^"]*)"', text)}
    dynamic = frozenset(re.findall(r"\.extern \.shared .*?(\w+)\[\]", text))
    constants = {
        name: (C_TYPES[kind], [int(v) for v in values.split(",")])
        for kind, name, values in re.findall(
            r"^\.(?:visible )?\.?(?:global|const) \.align \d+ \.(\w+) (\w+)\[\d+\] = \{([^}]*)\}",
            text,
            re.MULTILINE,
        )
    }
    shared = {
        name: int(size)
        for name, size in re.findall(
            r"^(?:\.\w+ )*\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", text, re.MULTILINE
        )
    }
    kernels = []
    pattern = r"\.(?:visible|weak) \.entry (\w+)\((.*?)\)\s*((?:\.\w+ [^\n{]*\n?)*)\{\n(.*?)\n\}\n"
    for match in re.finditer(pattern, text + "\n", re.DOTALL):
        first = text.count("\n", 0, match.start(4)) + 1
        kernels.append(_kernel(match[1], match[2], match[4], first, files))
    return Unit(kernels, dynamic, shared, constants)


def _kernel(name: str, parameters: str, body: str, first: int, files: dict[str, str]) -> Kernel:
    found = re.findall(r"\.param \.(\w+)\b[^,\n]*?(\w+)\s*(?=,|\n|$)", parameters)
    kernel = Kernel(name, {parameter: C_TYPES[kind] for kind, parameter in found})
    source: tuple[str, int] | None = None
    for number, raw in enumerate(body.split("\n"), first):
        # Scopes in braces hold nothing but registers of their own names.
        line = raw.strip()
        if line.startswith("{") and not line.endswith("}"):
            line = line[1:].strip()
        if line in {"", "{", "}"} or line.startswith((".pragma", ".maxntid", ".section", ".align")):
            continue
        if match := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>;", line):
            kernel.registers |= {f"%{match[2]}{i}": C_TYPES[match[1]] for i in range(int(match[3]))}
        elif match := re.fullmatch(r"\.reg \.(\w+)\s+([%\w, ]+);", line):
            kernel.registers |= {n.strip(): C_TYPES[match[1]] for n in match[2].split(",")}
        elif match := re.fullmatch(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", line):
            kernel.shared[match[1]] = int(match[2])
        elif match := re.fullmatch(r"\.local \.align \d+ \.b8\s+(\w+)\[(\d+)\];", line):
            kernel.local[match[1]] = int(match[2])
        elif match := re.fullmatch(r"([$\w]+):", line):
            kernel.body.append(Label(label(match[1])))
        elif match := re.match(r"\.loc\s+(\d+) (\d+)", line):
            name_ = files.get(match[1], "")
            source = (name_, int(match[2])) if name_.endswith((".cu", ".cuh")) else source
        else:
            line = re.sub(r"^\{\s*|\s*\}$", "", line)
            for statement in filter(None, map(str.strip, line.split(";"))):
                kernel.body.append(_instruction(statement, number, source))
    return kernel


def _instruction(text: str, line: int, source: tuple[str, int] | None) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if not match:
        raise UnknownPTX(text)
    name, *modifiers = re.split(r"\.|::", match[3])
    predicate = f"{match[1]}{register(match[2])}" if match[2] else ""
    return Instruction(text, predicate, name, tuple(modifiers), tuple(_operands(match[4])), line, source)


def _operands(text: str) -> Iterator[str]:
    """Parted at commas that stand in no bracket."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def label(name: str) -> str:
    return name.replace("$", "_")


def register(name: str) -> str:
    """The C++ variable of a register."""
    return f"r_{name.lstrip('%').replace('$', '_')}"
