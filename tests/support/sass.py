"""Faults that only machine code shows: registers touched under a product that still runs.

Hopper's products of a warpgroup (HGMMA) run asynchronously. One may take its A from registers, and
keeps its sums in some. Until a wait retires it nothing may write the first, or touch the second.
Assemblers up to CUDA 13.2 are known to reuse such registers too early, so whatever the suite
compiles is read. ``nvdisasm`` itself says which registers an instruction reads and writes.
"""

import re
from dataclasses import dataclass

PRODUCT, WAIT = "HGMMA", "WARPGROUP.DEPBAR"
_READ, _WRITTEN = "vx", "^x"  # marks in the column of a register


@dataclass(frozen=True)
class Instruction:
    text: str
    reads: frozenset[int]
    writes: frozenset[int]
    target: str = ""  # the label that it may jump to

    @property
    def name(self) -> str:
        """Without its predicate."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text)

    @property
    def goes_on(self) -> bool:
        """May the next instruction follow?"""
        return not re.match(r"(BRA|EXIT|RET|BRX)\b", self.text)


@dataclass(frozen=True)
class Listing:
    instructions: list[Instruction]
    labels: dict[str, int]  # which instruction each stands before

    def without(self, name: str) -> "Listing":
        """The same, as if all instructions of that name did nothing."""
        nothing = Instruction("NOP", frozenset(), frozenset())
        kept = [nothing if i.name.startswith(name) else i for i in self.instructions]
        return Listing(kept, self.labels)

    def count(self, name: str) -> int:
        return sum(i.name.startswith(name) for i in self.instructions)


def read(text: str) -> Listing:
    """What ``nvdisasm --print-life-ranges --life-range-mode narrow`` prints of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    first = last = None
    for line in text.splitlines():
        if heading := re.search(r"// \|\s*# (\d+)", line):  # 0123456789012...
            first, last = heading.span(1)
        elif label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;", line):
            assert first is not None, "no columns of registers"
            marks = line[first:last]
            reads, writes = (
                frozenset(n for n, mark in enumerate(marks) if mark in those)
                for those in (_READ, _WRITTEN)
            )
            jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1])
            instructions.append(Instruction(found[1], reads, writes, jump[1] if jump else ""))
    return Listing(instructions, labels)


def touched_too_early(code: Listing) -> set[str]:
    """Instructions that on some path meet the registers of a product under way."""
    faults: set[str] = set()
    known: set[tuple] = set()
    # (the next instruction, the groups of products under way, those of no group yet)
    paths: list[tuple[int, tuple[tuple[int, ...], ...], tuple[int, ...]]] = [(0, (), ())]
    while paths:
        at, groups, loose = path = paths.pop()
        if at >= len(code.instructions) or path in known:
            continue
        known.add(path)
        now = code.instructions[at]
        for i in (i for group in (*groups, loose) for i in group):
            product = code.instructions[i]
            sums, a = product.writes, product.reads - product.writes
            others = now.reads | now.writes if not now.name.startswith(PRODUCT) else frozenset()
            if now.writes & a or others & sums:
                faults.add(f"{now.text} under {product.text}")
        if now.name.startswith(PRODUCT):
            loose = (*loose, at)
            if "gsb0" in now.text:  # closes a group
                groups, loose = (*groups, loose), ()
        elif now.name.startswith(WAIT):
            left = int(re.search(r"gsb0, 0x([0-9a-f]+)", now.text)[1], 16)
            groups = groups[len(groups) - left :] if 0 < left <= len(groups) else groups
            groups = () if left == 0 else groups
        # without waits they would be ever more: the last ones are enough
        groups = groups[-4:]
        if now.target:
            paths.append((code.labels[now.target], groups, loose))
        if now.goes_on:
            paths.append((at + 1, groups, loose))
    return faults


def unfenced(ptx: str) -> list[str]:
    """Products that read shared memory by the asynchronous proxy, with no fence since a wait for
    copies into it; and nothing at all if there is no such wait."""
    faults, fenced = [], True
    for line in ptx.splitlines():
        if "cp.async.wait_group" in line:
            fenced = False
        elif "fence.proxy.async" in line:
            fenced = True
        elif not fenced and re.search(r"wgmma\.mma_async|tcgen05\.mma", line):
            faults.append(line.strip()[:80])
    return faults
