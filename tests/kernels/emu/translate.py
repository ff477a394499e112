"""PTX to C++, instruction by instruction: what then runs on the emulator is what the compiler decided on.

A register is a variable, a label a label, a branch a goto. What rounds differently on a device from one architecture to
the next (ex2, rcp, rsqrt and their like, marked approx) is computed in full precision.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from emu.ptx import C_TYPES, Instruction, Kernel, Label, Unit, UnknownPTX, label, parse, register

_SPECIAL = {"tid": "threadIdx", "ntid": "blockDim", "ctaid": "blockIdx", "nctaid": "gridDim"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # their names of comparisons
_ROUND = {"rni": "nearbyintf", "rmi": "floorf", "rpi": "ceilf", "rzi": "truncf"}
_WIDER = {
    "int16_t": "int32_t", "uint16_t": "uint32_t", "int32_t": "int64_t", "uint32_t": "uint64_t",
    "int64_t": "__int128", "uint64_t": "unsigned __int128",
}  # fmt: skip
_VECTORS = {
    ("uint32_t", 4): "uint4", ("uint32_t", 2): "uint2", ("float", 4): "float4", ("float", 2): "float2",
    ("uint16_t", 4): "ushort4", ("uint16_t", 2): "ushort2", ("uint8_t", 4): "uchar4", ("uint8_t", 2): "uchar2",
}  # fmt: skip


def translate(text: str) -> tuple[str, list[str]]:
    """C++ for all kernels of a PTX text, and their names: kernel `k` becomes `void k_ptx(...)`."""
    unit = parse(text)
    parts = ['#include "ptx.h"']
    for name, (kind, values) in unit.constants.items():
        parts.append(f"alignas(16) static const {kind} {name}[] = {{{', '.join(map(str, values))}}};")
    parts += [f"__shared__ unsigned char {name}[{size}];" for name, size in unit.shared.items()]
    parts += [_function(unit, kernel) for kernel in unit.kernels]
    return "\n".join(parts), [kernel.name for kernel in unit.kernels]


def _function(unit: Unit, kernel: Kernel) -> str:
    parameters = ", ".join(f"{kind} {name}" for name, kind in kernel.parameters.items())
    lines = [f"void {kernel.name}_ptx({parameters}) {{"]
    lines += [f"{kind} {register(name)};" for name, kind in kernel.registers.items()]
    lines += [f"__shared__ unsigned char {name}[{size}];" for name, size in kernel.shared.items()]
    lines += [f"alignas(16) unsigned char {name}[{size}];" for name, size in kernel.local.items()]
    writer = _Writer(unit, kernel)
    for item in kernel.body:
        if isinstance(item, Label):
            lines.append(f"{item.name}:;")
            continue
        if item.source:
            lines.append(f'#line {item.source[1]} "{item.source[0]}"')
        statement = writer.write(item)
        lines.append(f"if ({item.predicate}) {{ {statement} }}" if item.predicate else f"{{ {statement} }}")
    return "\n".join([*lines, "}"])


class _Writer:
    """Writes the instructions of one kernel."""

    def __init__(self, unit: Unit, kernel: Kernel) -> None:
        self.unit, self.kernel = unit, kernel

    def write(self, at: Instruction) -> str:
        """The C++ statement of an instruction, less its predicate."""
        if (method := getattr(self, f"_{at.name}", None)) is not None:
            statement: str = method(at)
            return statement
        if at.modifiers and at.modifiers[-1] == "f32" and at.name in _FLOAT:
            return self._float(at)
        if at.name in _INTEGER:
            kind = self._kind(at)
            operands = [self._read(operand, kind) for operand in at.operands[1:]]
            return self._set(at.operands[0], f"({kind})({_INTEGER[at.name](kind, *operands)})", kind)
        raise UnknownPTX(at.text)

    # ---- operands ----

    def _kind(self, at: Instruction) -> str:
        """The C type that an instruction names last."""
        kind = at.modifiers[-1]
        if kind not in C_TYPES or kind == "f64" or (kind in {"f16", "bf16"} and at.name != "cvt"):
            raise UnknownPTX(at.text)
        return C_TYPES[kind]

    def _address_of(self, name: str) -> str | None:
        """The address of an array: in shared memory its offset, else a pointer."""
        if name in self.unit.dynamic:
            return "((char*)emu_dynamic - emu::shared_base)"
        if name in self.kernel.shared or name in self.unit.shared:
            return f"((char*){name} - emu::shared_base)"
        if name in self.unit.constants or name in self.kernel.local:
            return f"((char*){name})"
        return None

    def _read(self, operand: str, kind: str) -> str:
        """An operand as a value of a C type."""
        if operand.startswith("!"):
            return f"!{self._read(operand[1:], kind)}"
        if (address := self._address_of(operand)) is not None:
            return f"(({kind})(int64_t){address})"
        if operand in self.kernel.registers:
            held = self.kernel.registers[operand]
            return register(operand) if held == kind else f"ptx_as<{kind}>({register(operand)})"
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            bits = f"emu_bits<float>(0x{match[1]}u)"
            return bits if kind == "float" else f"ptx_as<{kind}>({bits})"
        if match := re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", operand):
            return f"(({kind}){_SPECIAL[match[1]]}.{match[2]})"
        if operand == "%laneid":
            return f"(({kind})emu::current->lane)"
        if re.fullmatch(r"-?\d+|-?0x[0-9a-fA-F]+", operand):
            value = int(operand, 0)
            return f"(({kind}){value}{'ULL' if value >= 2**63 else 'LL'})"
        raise UnknownPTX(f"operand {operand}")

    def _set(self, operand: str, value: str, kind: str) -> str:
        """operand = value, which has a C type; narrower integers widen as they are signed."""
        held = self.kernel.registers[operand]
        if held == kind:
            return f"{register(operand)} = {value};"
        if "float" in (held, kind):
            return f"{register(operand)} = ptx_as<{held}>(({kind})({value}));"
        return f"{register(operand)} = ({held})({kind})({value});"

    def _floats(self, at: Instruction, operands: tuple[str, ...]) -> list[str]:
        values = [self._read(operand, "float") for operand in operands]
        return [f"ptx_ftz({value})" for value in values] if "ftz" in at.modifiers else values

    # ---- control ----

    def _ret(self, at: Instruction) -> str:
        return "return;"

    _exit = _ret

    def _bra(self, at: Instruction) -> str:
        return f"goto {label(at.operands[0])};"

    def _bar(self, at: Instruction) -> str:
        if "warp" in at.modifiers:
            return f"__syncwarp({self._read(at.operands[0], 'uint32_t')}, {at.line});"
        if at.modifiers == ("sync",) and at.operands == ("0",):
            return f"__syncthreads({at.line});"
        if at.modifiers[:1] == ("red",) and at.operands[1] == "0":
            if at.modifiers[1] == "popc":
                call = f"__syncthreads_count({self._read(at.operands[2], 'bool')}, {at.line})"
                return self._set(at.operands[0], call, "uint32_t")
            call = f"__syncthreads_{at.modifiers[1]}({self._read(at.operands[2], 'bool')}, {at.line})"
            return self._set(at.operands[0], f"{call} != 0", "bool")
        raise UnknownPTX(at.text)

    _barrier = _bar

    def _shfl(self, at: Instruction) -> str:
        target, _, moved = at.operands[0].partition("|")
        if moved and any(
            isinstance(other, Instruction)
            and (moved in other.operands or other.predicate.lstrip("!") == register(moved))
            for other in self.kernel.body
        ):  # whether the lane was in its section: the shim keeps no account of that
            raise UnknownPTX(at.text)
        call = {"bfly": "xor_", "down": "down_", "up": "up_", "idx": ""}[at.modifiers[1]]
        mask, value, lane, clamp = (self._read(at.operands[i], "uint32_t") for i in (4, 1, 2, 3))
        text = f"__shfl_{call}sync({mask}, {value}, {lane}, 32 - ({clamp} >> 8), {at.line})"
        return self._set(target, text, "uint32_t")

    def _vote(self, at: Instruction) -> str:
        mask, value = self._read(at.operands[2], "uint32_t"), self._read(at.operands[1], "bool")
        kind = "uint32_t" if at.modifiers[1] == "ballot" else "bool"
        if at.modifiers[1] not in {"ballot", "any", "all"}:
            raise UnknownPTX(at.text)
        call = f"__{at.modifiers[1]}_sync({mask}, {value}, {at.line})"
        return self._set(at.operands[0], call if kind == "uint32_t" else f"{call} != 0", kind)

    # ---- memory ----

    def _mov(self, at: Instruction) -> str:
        kind = self._kind(at)
        target, value = at.operands
        if target.startswith("{"):
            parts = target[1:-1].replace(" ", "").split(",")
            width = int(at.modifiers[-1][1:]) // len(parts)
            sets = [
                self._set(part, f"bits >> {width * i}", f"uint{width}_t")
                for i, part in enumerate(parts)
                if part != "_"
            ]
            return f"auto bits = {self._read(value, kind)}; {' '.join(sets)}"
        if value.startswith("{"):
            parts = value[1:-1].replace(" ", "").split(",")
            width = int(at.modifiers[-1][1:]) // len(parts)
            joined = " | ".join(
                f"(({kind}){self._read(part, f'uint{width}_t')} << {width * i})"
                for i, part in enumerate(parts)
            )
            return self._set(target, joined, kind)
        return self._set(target, self._read(value, kind), kind)

    def _cvta(self, at: Instruction) -> str:
        if "shared" in at.modifiers:  # generic addresses of shared memory
            raise UnknownPTX(at.text)
        return self._set(at.operands[0], self._read(at.operands[1], "uint64_t"), "uint64_t")

    def _place(self, at: Instruction, operand: str) -> str:
        match = re.fullmatch(r"\[([%\w$]+)(?:\+(-?\d+))?\]", operand)
        if not match:
            raise UnknownPTX(at.text)
        base = f"(int64_t){self._read(match[1], 'uint32_t' if 'shared' in at.modifiers else 'uint64_t')}"
        if "shared" in at.modifiers:
            return f"(emu::shared_base + {base} + {match[2] or 0})"
        if {"global", "const", "local"} & set(at.modifiers):
            return f"((char*)({base}) + {match[2] or 0})"
        raise UnknownPTX(at.text)

    def _ld(self, at: Instruction) -> str:
        kind, (target, source) = self._memory_kind(at), at.operands
        if "param" in at.modifiers:
            name = source[1:-1]
            if name not in self.kernel.parameters:
                raise UnknownPTX(at.text)
            return self._set(target, f"ptx_as<{kind}>({name})", kind)
        if not target.startswith("{"):
            return self._set(target, f"*({kind}*){self._place(at, source)}", kind)
        parts = target[1:-1].replace(" ", "").split(",")
        vector = self._vector(at, kind, len(parts))
        sets = [
            self._set(part, f"v.{axis}", kind)
            for part, axis in zip(parts, "xyzw", strict=False)
            if part != "_"
        ]
        return f"{vector} v = *({vector}*){self._place(at, source)}; {' '.join(sets)}"

    def _st(self, at: Instruction) -> str:
        kind, (target, source) = self._memory_kind(at), at.operands
        if not source.startswith("{"):
            return f"*({kind}*){self._place(at, target)} = {self._narrow(source, kind)};"
        parts = source[1:-1].replace(" ", "").split(",")
        vector = self._vector(at, kind, len(parts))
        values = ", ".join(self._narrow(part, kind) for part in parts)
        return f"{vector} v = {{{values}}}; *({vector}*){self._place(at, target)} = v;"

    def _memory_kind(self, at: Instruction) -> str:
        kind = at.modifiers[-1]
        if kind not in C_TYPES or kind in {"f64", "pred"} or "volatile" in at.modifiers:
            raise UnknownPTX(at.text)
        return C_TYPES[kind]

    def _narrow(self, operand: str, kind: str) -> str:
        """A register as it is stored: its low bytes."""
        held = self.kernel.registers.get(operand)
        if held and "float" not in (held, kind):
            return f"({kind}){register(operand)}"
        return self._read(operand, kind)

    def _vector(self, at: Instruction, kind: str, length: int) -> str:
        if f"v{length}" not in at.modifiers or (kind, length) not in _VECTORS:
            raise UnknownPTX(at.text)
        return _VECTORS[kind, length]

    def _atom(self, at: Instruction) -> str:
        call = {
            "add": "atomicAdd",
            "max": "atomicMax",
            "min": "atomicMin",
            "exch": "atomicExch",
            "or": "atomicOr",
        }
        kind, operation = self._kind(at), at.modifiers[-2]
        if operation not in call:
            raise UnknownPTX(at.text)
        place, value = self._place(at, at.operands[-2]), self._read(at.operands[-1], kind)
        text = f"{call[operation]}(({kind}*){place}, {value})"
        return self._set(at.operands[0], text, kind) if at.name == "atom" else f"{text};"

    _red = _atom

    # ---- values ----

    def _setp(self, at: Instruction) -> str:
        how, real = at.modifiers[0], at.modifiers[-1] == "f32"
        kind = self._kind(at)
        if real:
            a, b = self._floats(at, at.operands[1:3])
            # A comparison with NaN is false; the unordered kinds (equ, ...) are true.
            unordered = how.endswith("u") and how[:-1] in _COMPARE
            how = how[:-1] if unordered else how
            text = f"({a} {_COMPARE[how]} {b})" if how in _COMPARE else ""
            number = f"({a} == {a} && {b} == {b})"
            if how in {"num", "nan"}:
                text = number if how == "num" else f"!{number}"
            elif not text:
                raise UnknownPTX(at.text)
            elif unordered:
                text = f"({text} || !{number})"
            elif how == "ne":
                text = f"({text} && {number})"
        else:
            a, b = (self._read(operand, kind) for operand in at.operands[1:3])
            text = f"({a} {_COMPARE[_UNSIGNED.get(how, how)]} {b})"
        joined = next((word for word in at.modifiers[1:-1] if word in {"and", "or", "xor"}), None)
        if joined:
            sign = {"and": "&&", "or": "||", "xor": "!="}[joined]
            text = f"({text} {sign} {self._read(at.operands[3], 'bool')})"
        if "|" in at.operands[0]:
            raise UnknownPTX(at.text)
        return self._set(at.operands[0], text, "bool")

    def _selp(self, at: Instruction) -> str:
        kind = self._kind(at)
        one, other = (self._read(operand, kind) for operand in at.operands[1:3])
        return self._set(at.operands[0], f"{self._read(at.operands[3], 'bool')} ? {one} : {other}", kind)

    def _float(self, at: Instruction) -> str:
        if at.name == "fma" and "rm" in at.modifiers:
            text = "ptx_fma_down({}, {}, {})".format(*self._floats(at, at.operands[1:]))
        elif at.name == "add" and "rz" in at.modifiers:
            text = "ptx_add_towards_zero({}, {})".format(*self._floats(at, at.operands[1:]))
        elif {"rz", "rm", "rp", "NaN", "xorsign"} & set(at.modifiers):
            raise UnknownPTX(at.text)
        else:
            text = _FLOAT[at.name](*self._floats(at, at.operands[1:]))
        text = f"ptx_saturate({text})" if "sat" in at.modifiers else text
        text = f"ptx_ftz({text})" if "ftz" in at.modifiers else text
        return self._set(at.operands[0], text, "float")

    def _cvt(self, at: Instruction) -> str:
        to, source = [word for word in at.modifiers if word in C_TYPES][-2:]
        if "f64" in (to, source) or "f16x2" in at.modifiers or "bf16x2" in at.modifiers:
            raise UnknownPTX(at.text)
        kind = C_TYPES[to]
        rounding = next((_ROUND[word] for word in at.modifiers if word in _ROUND), "")
        if source == "f32":
            (value,) = self._floats(at, at.operands[1:])
            value = f"{rounding}({value})" if rounding else value
            value = f"ptx_saturate({value})" if "sat" in at.modifiers else value
            if to == "f32":
                return self._set(
                    at.operands[0], f"ptx_ftz({value})" if "ftz" in at.modifiers else value, kind
                )
            if to in {"f16", "bf16"} and "rn" in at.modifiers and "relu" not in at.modifiers:
                call = "ptx_to_half" if to == "f16" else "ptx_to_bfloat16"
                return self._set(at.operands[0], f"{call}({value})", kind)
            if to[0] in "su" and rounding:
                return self._set(at.operands[0], f"ptx_to_integer<{kind}>({value})", kind)
            raise UnknownPTX(at.text)
        if source in {"f16", "bf16"}:
            if to != "f32":
                raise UnknownPTX(at.text)
            call = "ptx_from_half" if source == "f16" else "ptx_from_bfloat16"
            return self._set(at.operands[0], f"{call}({self._read(at.operands[1], 'uint16_t')})", kind)
        if "sat" in at.modifiers or to in {"f16", "bf16"}:
            raise UnknownPTX(at.text)
        value = self._narrow(at.operands[1], C_TYPES[source])
        return self._set(at.operands[0], f"({kind}){value}", kind)

    def _not(self, at: Instruction) -> str:
        kind = self._kind(at)
        value = self._read(at.operands[1], kind)
        return self._set(at.operands[0], f"!{value}" if kind == "bool" else f"~{value}", kind)

    def _shift(self, at: Instruction) -> str:
        kind = self._kind(at)
        call = "ptx_shift_left" if at.name == "shl" else "ptx_shift_right"
        value, by = self._read(at.operands[1], kind), self._read(at.operands[2], "uint32_t")
        return self._set(at.operands[0], f"{call}<{kind}>({value}, {by})", kind)

    _shl = _shift
    _shr = _shift

    def _shf(self, at: Instruction) -> str:
        if at.modifiers[1] != "wrap":
            raise UnknownPTX(at.text)
        call = {"l": "ptx_funnel_left", "r": "ptx_funnel_right"}[at.modifiers[0]]
        values = ", ".join(self._read(operand, "uint32_t") for operand in at.operands[1:])
        return self._set(at.operands[0], f"{call}({values})", "uint32_t")

    def _mul(self, at: Instruction) -> str:
        if at.modifiers[-1] == "f32":
            return self._float(at)
        kind = self._kind(at)
        a, b = (self._read(operand, kind) for operand in at.operands[1:3])
        if "wide" in at.modifiers:
            wide = _WIDER[kind]
            return self._set(at.operands[0], self._sum(at, f"({wide}){a} * ({wide}){b}", wide), wide)
        if "hi" in at.modifiers:
            text = f"ptx_high<{_WIDER[kind]}, {kind}>({a}, {b})"
        else:  # as unsigned: what is too large wraps
            text = f"(u{kind.removeprefix('u')}){a} * (u{kind.removeprefix('u')}){b}"
        return self._set(at.operands[0], f"({kind})({self._sum(at, text, kind)})", kind)

    def _sum(self, at: Instruction, product: str, kind: str) -> str:
        if at.name == "mul":
            return product
        return f"({kind})({product}) + {self._read(at.operands[3], kind)}"

    _mad = _mul

    def _brev(self, at: Instruction) -> str:
        return self._set(at.operands[0], f"__brev({self._read(at.operands[1], 'uint32_t')})", "uint32_t")

    def _popc(self, at: Instruction) -> str:
        return self._set(
            at.operands[0], f"__popcll({self._read(at.operands[1], self._kind(at))})", "uint32_t"
        )

    def _clz(self, at: Instruction) -> str:
        return self._set(at.operands[0], f"__clz({self._read(at.operands[1], 'uint32_t')})", "uint32_t")

    def _prmt(self, at: Instruction) -> str:
        if at.modifiers != ("b32",):
            raise UnknownPTX(at.text)
        values = ", ".join(self._read(operand, "uint32_t") for operand in at.operands[1:])
        return self._set(at.operands[0], f"ptx_permute({values})", "uint32_t")

    def _bfe(self, at: Instruction) -> str:
        kind = self._kind(at)
        at_, width = (f"({self._read(operand, 'uint32_t')} & 255)" for operand in at.operands[2:])
        return self._set(
            at.operands[0], f"ptx_extract({self._read(at.operands[1], kind)}, {at_}, {width})", kind
        )

    def _bfi(self, at: Instruction) -> str:
        values = ", ".join(self._read(operand, "uint32_t") for operand in at.operands[1:])
        if at.modifiers != ("b32",):
            raise UnknownPTX(at.text)
        return self._set(at.operands[0], f"ptx_insert({values})", "uint32_t")


def _unsigned(kind: str) -> str:
    return kind if kind.startswith("u") or kind == "bool" else f"u{kind}"


def _infix(sign: str) -> Callable[..., str]:
    # As unsigned: what is too large wraps.
    return lambda kind, a, b: f"({_unsigned(kind)}){a} {sign} ({_unsigned(kind)}){b}"


_INTEGER: dict[str, Callable[..., str]] = {
    "add": _infix("+"),
    "sub": _infix("-"),
    "and": _infix("&"),
    "or": _infix("|"),
    "xor": _infix("^"),
    "div": lambda kind, a, b: f"{a} / {b}",
    "rem": lambda kind, a, b: f"{a} % {b}",
    "max": lambda kind, a, b: f"std::max<{kind}>({a}, {b})",
    "min": lambda kind, a, b: f"std::min<{kind}>({a}, {b})",
    "neg": lambda kind, a: f"-({_unsigned(kind)}){a}",
    "abs": lambda kind, a: f"{a} < 0 ? -{a} : {a}",
}
_FLOAT: dict[str, Callable[..., str]] = {
    "add": "({} + {})".format,
    "sub": "({} - {})".format,
    "mul": "({} * {})".format,
    "div": "({} / {})".format,
    "fma": "fmaf({}, {}, {})".format,
    "max": "ptx_max({}, {})".format,
    "min": "ptx_min({}, {})".format,
    "neg": "(-{})".format,
    "abs": "fabsf({})".format,
    "rcp": "(1.f / {})".format,
    "sqrt": "sqrtf({})".format,
    "rsqrt": "(1.f / sqrtf({}))".format,
    "ex2": "exp2f({})".format,
    "lg2": "log2f({})".format,
    "sin": "sinf({})".format,
    "cos": "cosf({})".format,
    "tanh": "tanhf({})".format,
}
