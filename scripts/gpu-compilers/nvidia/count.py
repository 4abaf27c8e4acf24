"""count.py FOLDER: prints a table of the instructions in the SASS of kernels, and the share of a card's busiest pipe that
they take at the full speed of its memory. FOLDER holds NAME.ARCH.sass (cuobjdump -sass) and NAME.ARCH.log (ptxas -v).

What is counted is the way round the loop over blocks of quads that an invocation takes in the common case: it loads four
quads, needs nothing unusual, and stores four where the kernel stores. A step of an optimizer takes four elements instead.
These are counts, not timings.
"""

import heapq
import re
import sys
from collections import Counter
from pathlib import Path

# Results a clock and multiprocessor. CUDA C++ Programming Guide, "Arithmetic Instructions", table "Throughput of Native
# Arithmetic Instructions": float32 add, multiply and multiply-add; 32-bit integer add, compare, shift and logic;
# 32-bit integer multiply-add; and type conversions, for which 16 is the table's least. A multiply-add of integers takes
# two turns of the pipe of float32 where that one is twice as wide. 32 lanes for each of four schedulers are issued.
RATES = {
    "sm_80": {"fma": 64, "imad": 64, "alu": 64, "convert": 16, "issue": 128},
    "sm_89": {"fma": 128, "imad": 64, "alu": 64, "convert": 16, "issue": 128},
    "sm_90": {"fma": 128, "imad": 64, "alu": 64, "convert": 16, "issue": 128},
    "sm_100": {"fma": 128, "imad": 64, "alu": 64, "convert": 16, "issue": 128},
    # AMD's CDNA 3 and RDNA 3 instruction set guides: four SIMDs of 16 lanes, or two of 32, for all vector instructions.
    # Two that are issued as one count as one. The scalar unit's are issued beside.
    "gfx1100": {"fma": 64, "imad": 64, "alu": 64, "convert": 64, "issue": 128},
}

# Name, architecture, multiprocessors, GHz and TB/s. Memory and peak float32 are of the data sheets; GHz is the boost
# clock that this peak means (peak / multiprocessors / lanes / 2).
CARDS = [
    # NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM): 2,039 GB/s, 19.5 TFLOPS.
    ("A100", "sm_80", 108, 1.41, 2.039),
    # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: 1,008 GB/s, 82.6 TFLOPS.
    ("4090", "sm_89", 128, 2.52, 1.008),
    # NVIDIA H100 Tensor Core GPU data sheet (SXM): 3.35 TB/s, 67 TFLOPS.
    ("H100", "sm_90", 132, 1.98, 3.35),
    # NVIDIA H200 Tensor Core GPU data sheet (SXM): 4.8 TB/s, 67 TFLOPS.
    ("H200", "sm_90", 132, 1.98, 4.8),
    # NVIDIA DGX B200 data sheet, an eighth: 8 TB/s, 75 TFLOPS with 148 multiprocessors.
    ("B200", "sm_100", 148, 1.98, 8.0),
    # AMD Instinct MI300X data sheet: 5.3 TB/s, 163.4 TFLOPS, 304 compute units. Debian's compiler knows no CDNA 3, so the
    # counts are RDNA 3's.
    ("MI300X", "gfx1100", 304, 2.1, 5.3),
    # AMD Radeon RX 7900 XTX specifications: 960 GB/s, 61.4 TFLOPS, 96 compute units.
    ("7900 XTX", "gfx1100", 96, 2.5, 0.96),
]

ALU = """IADD3 IADD LOP3 LOP SHF SHL SHR IMNMX VIMNMX VIMNMX3 ISETP SEL PRMT LEA PLOP3 IABS ISET BMSK SGXT VIADD VIADDMNMX
    P2R R2P MOV CS2R FSETP FSEL FMNMX FMNMX3 FSET HMNMX2 HSETP2 HSET2 VOTE VIADD2 SHFL VALU""".split()
FMA = "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HADD2 HMUL2 HFMA2".split()
CONVERT = "I2F I2FP F2F F2FP F2I F2IP MUFU POPC FLO BREV".split()
MEMORY = "LDG STG LDS STS LDL STL LD ST LDC LDSM RED ATOM ATOMS ATOMG REDUX".split()


def operation(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def pipe(instruction: str) -> str:
    op = operation(instruction)
    name = op.split(".")[0]
    # ptxas converts float16 by an addition of 0.
    if name in CONVERT or op.startswith("HADD2.F32"):
        return "convert"
    if name in ALU:
        return "alu"
    if name == "IMAD":
        return "imad"
    if name in FMA:
        return "fma"
    return "memory" if name in MEMORY else "other"


class Kernel:
    """Basic blocks, and where each goes."""

    def __init__(self, sass: str):
        found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.M)
        self.code = [(int(at, 16), text) for at, text in found]
        targets = {int(m[1], 16) for _, text in self.code if (m := re.search(r"\b(?:BRA|JMP)\b.*?(0x[0-9a-f]+)\s*$", text))}
        self.blocks: dict[int, list[str]] = {}
        self.next: dict[int, list[int]] = {}
        current = None
        for (at, text), (behind, _) in zip(self.code, self.code[1:] + [(None, "")]):
            if current is None:
                current = at
                self.blocks[current], self.next[current] = [], []
            self.blocks[current].append(text)
            op = operation(text).split(".")[0]
            guarded = text.startswith("@") or re.search(r"BRA\S* (?:!?U?P\w+)", text)
            if op in ("BRA", "JMP"):
                self.next[current].append(int(re.search(r"(0x[0-9a-f]+)\s*$", text)[1], 16))
            leaves = op in ("BRA", "JMP", "EXIT", "RET")
            if (not leaves or guarded) and (leaves or behind in targets) and behind is not None:
                self.next[current].append(behind)
            if leaves or behind in targets:
                current = None

    def way(self, need: dict[str, int]) -> list[int] | None:
        """The shortest way round a loop that has at least so many of each kind of instruction."""
        kinds = list(need)

        def have(block: int) -> tuple[int, ...]:
            return tuple(sum(map(KINDS[kind], self.blocks[block])) for kind in kinds)

        def fits(got: tuple[int, ...]) -> bool:
            return all(a <= b for kind, a, b in zip(kinds, got, goal) if "load" in kind)

        goal = tuple(need.values())
        counts = {block: have(block) for block in self.blocks}
        best = None
        for start in self.blocks:
            if not any(operation(text).startswith("LDG") for text in self.blocks[start]):
                continue
            if not fits(counts[start]):
                continue
            first = tuple(min(a, b) for a, b in zip(counts[start], goal))
            queue = [(len(self.blocks[start]), 0, start, first, [start])]
            seen, number = set(), 0
            while queue:
                length, _, block, got, way = heapq.heappop(queue)
                if best and length >= best[0]:
                    break
                if (block, got) in seen:
                    continue
                seen.add((block, got))
                for behind in self.next[block]:
                    if behind not in self.blocks:
                        continue
                    if behind == start:
                        if got == goal and (best is None or length < best[0]):
                            best = (length, way)
                        continue
                    more = tuple(a + b for a, b in zip(got, counts[behind]))
                    if not fits(more):
                        continue
                    more = tuple(min(a, b) for a, b in zip(more, goal))
                    number += 1
                    heapq.heappush(queue, (length + len(self.blocks[behind]), number, behind, more, way + [behind]))
        return best and best[1]


def is_wide(op: str):
    return lambda text: operation(text).split(".")[0] == op and ".128" in operation(text)


KINDS = {
    "load": is_wide("LDG"),
    "store": is_wide("STG"),
    "narrow load": lambda text: operation(text).startswith("LDG") and ".128" not in operation(text),
    "narrow store": lambda text: operation(text).startswith("STG") and ".128" not in operation(text),
    "sum": lambda text: operation(text).split(".")[0] in ("FFMA", "FMUL", "FADD"),
    "bits": lambda text: operation(text).split(".")[0] in ("LOP3", "IADD3", "IADD", "VIADD"),
}


def loads_first(code: list[str]) -> int:
    """How many loads are issued before an instruction needs the result of one, in SASS."""
    loaded, loads = set(), 0
    for text in code:
        op, _, operands = re.sub(r"^@!?U?P\w+\s+", "", text).partition(" ")
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        target = re.match(r"\s*R(\d+)", operands)
        reads = registers[1:] if target and not op.startswith(("STG", "STS")) else registers
        if loaded & set(reads):
            break
        if op.startswith("LDG"):
            width = 4 if ".128" in op else 2 if ".64" in op else 1
            loaded |= {registers[0] + i for i in range(width)}
            loads += 1
    return loads


# By kernel: what the common way must hold (of loads exactly so many, of the rest at least), the bytes that it moves for each byte loaded, and the lines of a cache that
# a lane's load or store touches by itself.
QUAD_LINES, WORD_LINES = 4 / 32, 1 / 32
WAYS = {
    "norm": ({"load": 4, "narrow load": 0, "sum": 17}, 1, QUAD_LINES),
    "scale": ({"load": 4, "narrow load": 0, "store": 4, "sum": 16}, 2, QUAD_LINES),
    "clamp, clipped": ({"load": 4, "narrow load": 0, "store": 4, "bits": 96}, 2, QUAD_LINES),
    "clamp, unclipped": ({"load": 4, "narrow load": 0, "bits": 96}, 1, QUAD_LINES),
    "norm_each, columns": ({"narrow load": 16, "sum": 17}, 1, WORD_LINES),
    "norm_each, rows": ({"load": 4, "narrow load": 0, "sum": 17}, 1, 1),
    "scale_each, rows": ({"load": 1, "store": 1, "sum": 4}, 2, QUAD_LINES),
    "scale_each, columns": ({"load": 1, "store": 1, "sum": 4}, 2, QUAD_LINES),
}

# Of AdamW, by the types of gradient and parameter: the words that a step loads for four elements, and the bytes that it
# moves for one. Remainders of halves are loaded twice.
STEPS = {"F32, F32": (16, 28), "BF16, F32": (16, 26), "BF16, BF16": (18, 26)}

# By the name of a variant.
ROWS = {
    "Norm": ["norm"],
    "Scale": ["scale"],
    "Clamp": ["clamp, clipped", "clamp, unclipped"],
    "NormEach": ["norm_each, columns", "norm_each, rows"],
    "ScaleEach": ["scale_each, rows", "scale_each, columns"],
}


def rows_of(name: str) -> list[str]:
    if name.startswith("Step("):
        return ["step"]
    kernel, columns = name.split()[0], re.search(r"columns: (true|false)", name)
    rows = ROWS.get(kernel, [])
    return [rows[columns[1] == "true"]] if columns else rows


def dtypes_of(name: str) -> str:
    return ", ".join(re.findall(r"(?:dtype|gradient|parameter): (\w+)", name))


class AmdKernel(Kernel):
    """The same of a listing of ACO, Mesa's compiler for AMD, with its instructions under NVIDIA's names where a way needs
    them."""

    NAMES = [
        (r"(buffer|global)_load_(b128|dwordx4)", "LDG.128"),
        (r"(buffer|global)_store_(b128|dwordx4)", "STG.128"),
        (r"(buffer|global)_load_", "LDG"),
        (r"(buffer|global)_store_", "STG"),
        (r"v_(dual_)?(mul|add|sub|fma|fma_mix|fmac|mac|mad|fmamk|fmaak|subrev)_(legacy_)?f32", "FMUL"),
        (r"v_(and|or|xor|bfi|and_or|or3|xad|add3|add|sub|add_co|sub_co|add_nc|sub_nc|subrev)(_co|_nc)?_[ub]\d+", "LOP3"),
        (r"v_", "VALU"),
    ]

    def __init__(self, listing: str):
        self.blocks, self.next = {}, {}
        current, left = None, False
        for line in listing.splitlines():
            if m := re.match(r"BB(\d+):", line):
                previous, current = current, int(m[1])
                self.blocks[current], self.next[current] = [], []
                # An earlier block falls through unless it has left.
                if previous is not None and not left:
                    self.next[previous].append(current)
                left = False
            elif current is not None and line.startswith("\t") and (text := line.split(";")[0].strip()):
                name = next((name for pattern, name in self.NAMES if re.match(pattern, text)), text.split()[0])
                self.blocks[current].append(f"{name} {text}")
                if m := re.match(r"s_(cbranch_\w+|branch) BB(\d+)", text):
                    self.next[current].append(int(m[2]))
                    left = m[1] == "branch"
                left = left or text.startswith("s_endpgm")


class Row:
    """The counts of a common way, for each element."""

    def __init__(self, kernel: Kernel, name: str, row: str):
        if row == "step":
            loads, self.bytes = STEPS[dtypes_of(name)]
            need, elements, lines = {"narrow load": loads, "load": 0, "sum": 30}, 4, WORD_LINES
        else:
            need, moved, lines = WAYS[row]
            words = 1 if "F32" in name else 2
            # A word that is loaded alone gives one element, whatever is beside it.
            per_word = 1 if row == "norm_each, columns" else words
            # An addition for each element, but what is clamped takes a word at a time.
            need = {kind: count * (per_word if kind == "sum" else 1) for kind, count in need.items()}
            elements = need.get("load", 0) * 4 * per_word or need["narrow load"]
            self.bytes = 4 / words * moved
        way = kernel.way(need)
        if way is None:
            raise ValueError(f"{name}: no way of {row} has {need}")
        code = [text for block in way for text in kernel.blocks[block]]
        self.count = {kind: count / elements for kind, count in Counter(map(pipe, code)).items()}
        self.issued = len(code) / elements
        self.loads_first = "" if isinstance(kernel, AmdKernel) else str(loads_first(code))
        kinds = ["narrow load", "narrow store"] if lines == WORD_LINES else ["load", "store"]
        self.lines = lines * sum(KINDS[kind](text) for kind in kinds for text in code) / elements

    def pipes(self, arch: str) -> dict[str, float]:
        """Clocks of a multiprocessor for each element, by pipe."""
        count, rates = self.count.get, RATES[arch]
        if arch.startswith("gfx"):
            return {"vector": (count("alu", 0) + count("fma", 0)) / rates["alu"], "cache": self.lines}
        return {
            "integer": count("alu", 0) / rates["alu"],
            "float": count("fma", 0) / rates["fma"] + count("imad", 0) / rates["imad"],
            "conversion": count("convert", 0) / rates["convert"],
            "issue": self.issued / rates["issue"],
            "cache": self.lines,
        }


def main(folder: Path) -> None:
    files = sorted((file for file in folder.iterdir() if file.suffix in (".s", ".sass")), key=lambda file: (file.name.split()[0], file.name))
    print(HEAD)
    cells = ["kernel", "dtype", "for", "registers", "spilled", "all", "integer", "float", "conversion", "loads first"]
    cells += [f"{card[0]}" for card in CARDS]
    print("| " + " | ".join(cells) + " |\n" + "|---" * len(cells) + "|")
    for file in files:
        name, arch = file.stem.rsplit(".", 1)
        amd = file.suffix == ".s"
        kernel = (AmdKernel if amd else Kernel)(file.read_text())
        log = "" if amd else file.with_suffix(".log").read_text()
        registers, spilled = (re.search(of, log) for of in [r"Used (\d+) registers", r"(\d+) bytes spill stores"])
        for of in rows_of(name):
            row = Row(kernel, name, of)
            count = row.count.get
            numbers = [row.issued, count("alu", 0), count("fma", 0) + count("imad", 0), count("convert", 0)]
            cells = [of, dtypes_of(name), arch, *(found[1] if found else "" for found in (registers, spilled))]
            cells += [f"{number:.1f}" for number in numbers] + [row.loads_first]
            pipes = row.pipes(arch)
            busiest = max(pipes, key=pipes.get)
            for _, own, multiprocessors, ghz, speed in CARDS:
                # The time of the pipe over that of the memory.
                share = pipes[busiest] / (multiprocessors * ghz * 1e9) / (row.bytes / (speed * 1e12))
                cells.append(f"{share:.2f} {busiest}" if own == arch else "")
            print("| " + " | ".join(cells) + " |")


HEAD = """Counts of NVIDIA's compiler (`scripts/gpu-compilers/nvidia.sh`), not timings, and of its CUDA front end: the compiler in
a Vulkan driver shares the back end and may choose otherwise. Instructions for each element on the common way round the loop
over blocks: all, by the pipe that runs them (`float` holds the multiply-adds of integers), and how many loads are issued
before the first use of one. A card's column has the share of its busiest pipe at the full speed of its memory: at 0.75 there
is room, above 1 the kernel cannot reach that speed. `cache` counts look-ups of lines, for which one a clock is assumed.
"""

if __name__ == "__main__":
    main(Path(sys.argv[1]))
