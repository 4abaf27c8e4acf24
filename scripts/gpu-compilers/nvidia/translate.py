"""translate.py FILE.wgsl: prints the module in CUDA C++, for NVIDIA's compiler.

It knows the WGSL that shaders/ is written in, and no more. The module becomes a struct: its functions are methods and its
private variables are members, so that nothing but the entry point is different code.
"""

import re
import sys
from pathlib import Path

# The built-in values that kernels take.
BUILTINS = {
    "workgroup_id": "{blockIdx.x, blockIdx.y, blockIdx.z}",
    "num_workgroups": "{gridDim.x, gridDim.y, gridDim.z}",
    "global_invocation_id": "{blockIdx.x * blockDim.x + threadIdx.x, 0, 0}",
    "local_invocation_index": "threadIdx.x",
    "subgroup_id": "threadIdx.x / 32",
    "num_subgroups": "blockDim.x / 32",
    "subgroup_invocation_id": "threadIdx.x % 32",
    "subgroup_size": "32",
}
# Elements of an array without a length: enough that no index seems wrong.
ENDLESS = 1 << 24


def declared(name: str, kind: str) -> str:
    """A declaration in C++."""
    if array := re.fullmatch(r"array<(.+?)(?:, (\w+))?>", kind):
        return f"{array[1]} {name}[{array[2] or ENDLESS}]"
    return f"{kind} {name}"


def members(body: str) -> list[tuple[str, str, str]]:
    """Attributes, name and type of each member of a struct, or parameter of a function."""
    found = re.findall(r"((?:@\w+(?:\([^)]*\))?\s*)*)(\w+):\s*((?:[^,<]|<(?:[^<>]|<[^<>]*>)*>)+),?", body)
    return [(attributes, name, kind.strip()) for attributes, name, kind in found]


def struct(name: str, body: str) -> str:
    fields = [(field, kind) for _, field, kind in members(body)]
    lines = [f"struct {name} {{"] + [f"    {declared(field, kind)};" for field, kind in fields]
    if not any(kind.startswith("array") for _, kind in fields):
        parameters = ", ".join(f"{kind} {field}_" for field, kind in fields)
        values = ", ".join(f"{field}({field}_)" for field, _ in fields)
        lines += [f"    {name}() = default;", f"    FN {name}({parameters}) : {values} {{}}"]
    return "\n".join(lines + ["};"])


def statement(line: str) -> str:
    """A line of a function's body."""
    line = re.sub(r"\bvar (\w+): ([^;=]+)(?=;| =)", lambda m: declared(m[1], m[2].strip()), line)
    line = re.sub(r"\b(?:let|var) (\w+) =", r"auto \1 =", line)
    line = re.sub(r"\blet (\w+): (\w+) =", r"\2 \1 =", line)
    line = re.sub(r"\.(xz|yw)\b", r".\1()", line)
    line = re.sub(r"\bloop \{", "while (true) {", line)
    line = re.sub(r"\b(if|while) (.*) \{$", r"\1 (\2) {", line)
    return line


def translated(source: str) -> str:
    source = re.sub(r"//.*", "", source)
    source = re.sub(r"(?<![\w.])(\d+\.\d+(?:e-?\d+)?)(?![\w.])", r"\1f", source)
    structs = {m[1]: m[2] for m in re.finditer(r"struct (\w+) \{(.*?)\}", source, re.S)}
    out = ['#include "wgsl.h"']
    bindings, shared, methods, entry = [], [], [], None
    lines = iter(source.splitlines())
    workgroup = 1
    for line in lines:
        if m := re.match(r"struct (\w+) \{", line):
            out.append(struct(m[1], structs[m[1]]))
            for line in lines:
                if line == "}":
                    break
        elif m := re.match(r"const (\w+)(?:: (\w+))? =", line):
            while not line.rstrip().endswith(";"):
                line += next(lines)
            value = line.split("=", 1)[1].strip().rstrip(";")
            kind = m[2]
            if kind is None:
                out.append(f"#define {m[1]} ({value})")
            else:
                out.append(f"constexpr {kind} {m[1]} = {value};")
        elif m := re.match(r"(?:@\w+\(\d+\) )*var<(\w+)(?:, \w+)?> (\w+): (.+);", line):
            space, name, kind = m.groups()
            if space == "private":
                methods.append(f"{declared(name, kind)};")
            elif space == "workgroup":
                methods.append(f"{re.fullmatch(r'array<(.+?), .+>', kind)[1]}* {name};")
                shared.append((name, kind))
            else:
                array = re.fullmatch(r"array<(.+)>", kind)
                kind, reference = (array[1], "*") if array else (kind, "&")
                methods.append(f"{kind}{reference} {name};")
                bindings.append((name, kind, reference, space))
        elif "@compute" in line:
            workgroup = re.search(r"@workgroup_size\((\w+)\)", line)[1]
        elif line.startswith("fn "):
            while not line.rstrip().endswith(("{", "{}")):
                line += " " + next(lines).strip()
            name, parameters, result, empty = re.fullmatch(
                r"fn (\w+)\((.*?)\)(?: -> (.+?))? \{(\}?)", line.strip()
            ).groups()
            if name == "main":
                entry = members(parameters)
            own = ", ".join(f"{kind} {own}" for _, own, kind in members(parameters))
            methods.append(f"FN {result or 'void'} {name}({own}) {{{empty}")
            if empty:
                continue
            joined = ""
            for line in lines:
                joined += line.strip() + " "
                opens = joined.count("(") - joined.count(")")
                # A statement may go on after a line's end.
                if line != "}" and (opens > 0 or not re.search(r"[;{}]\s*$", line)) and line.strip():
                    continue
                methods.append(statement(re.sub(r",\s*\)", ")", joined.rstrip())))
                joined = ""
                if line == "}":
                    break
    out.append("struct Module {\n" + "\n".join(methods) + "\n};")
    parameters, values = [], []
    for name, kind, reference, space in bindings:
        if space == "uniform":
            out.append(f"__constant__ {kind} constant_{name};")
            values.append(f"    Module_{name}")
        else:
            parameters.append(f"{kind}* __restrict__ {name}" if space == "uniform" else f"{kind}* {name}")
    body = [f"__shared__ {declared('shared_' + name, kind)};" for name, kind in shared]
    # A module's members in the order of their declaration.
    initial = []
    for method in methods:
        if m := re.match(r"(\w+(?:<\w+>)?)([*&]) (\w+);$", method):
            bound = {name: space for name, _, _, space in bindings}
            if m[3] not in bound:
                initial.append(f".{m[3]} = shared_{m[3]}")
            elif bound[m[3]] == "uniform":
                initial.append(f".{m[3]} = constant_{m[3]}")
            else:
                initial.append(f".{m[3]} = {'*' if m[2] == '&' else ''}{m[3]}")
    body.append("Module module{" + ", ".join(initial) + "};")
    arguments = []
    for attributes, name, kind in entry:
        if builtin := re.search(r"@builtin\((\w+)\)", attributes):
            body.append(f"{kind} {name} = {BUILTINS[builtin[1]]};")
        else:
            fields = [re.search(r"@builtin\((\w+)\)", field[0])[1] for field in members(structs[kind])]
            body.append(f"{kind} {name}; ")
            for field, builtin in zip(members(structs[kind]), fields):
                body.append(f"{name}.{field[1]} = {BUILTINS[builtin]};")
        arguments.append(name)
    body.append(f"module.main({', '.join(arguments)});")
    out.append(f'extern "C" __global__ void __launch_bounds__({workgroup}) kernel({", ".join(parameters)}) {{')
    return "\n".join(out + body + ["}"]) + "\n"


if __name__ == "__main__":
    print(translated(Path(sys.argv[1]).read_text()), end="")
