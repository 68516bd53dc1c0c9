"""The report of ptxas on the Hopper kernels: registers, spills, wgmma. Needs no GPU.

The build keeps the report of ptxas (cuda/build/compiler_log.py). The test compiles the kernels
itself only where there is no report, or an older one.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "cuda/hopper").iterdir())
LOG = "hopper_ptxas.log"
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
# Its groups: fp8, warp groups, m64 blocks, tokens, form.
TILE = re.compile(r"TileILb(\d)ELi(\d+)ELi(\d+)ELi(\d+)ELi\d+ELi\d+ELi\d+ELNS\w*4FormE(\d)E")
FORMS = ("kDense", "kMetadata", "kZeros")


def complaints(log):
    """The faults of the kernels in a ptxas report, one line for each."""
    # These messages say that wgmma is serialised, or setmaxnreg ignored.
    found = [line.strip() for line in log.splitlines() if re.search(r"\(C75\d\d\)", line)]
    name = None
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            name = entry[1]
        if "stack frame" in line and any(int(n) for n in re.findall(r"(\d+) bytes", line)):
            found.append(f"{name}: {line.strip()}")
    return found


def nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    changed = max(path.stat().st_mtime for path in SOURCES)
    built = [path for path in ROOT.glob(f"build/*/{LOG}") if path.stat().st_mtime > changed]
    if built:
        return max(built, key=lambda path: path.stat().st_mtime).read_text()
    if os.environ.get("SLIDEJAX_CUDA") == "0":
        pytest.skip("the kernels have not been built here: SLIDEJAX_CUDA=0")
    if nvcc() is None:
        pytest.skip("the kernels have not been built here, and there is no nvcc")
    command = [
        nvcc(),
        "-std=c++17",
        "-O3",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Xptxas=-v",
        "-cubin",
        f"-I{ROOT / 'cuda'}",
    ]
    source, to = (
        ROOT / "cuda/hopper/launch.cu",
        tmp_path_factory.mktemp("compiled") / "hopper.cubin",
    )
    done = subprocess.run([*command, "-o", to, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]
    return done.stdout + done.stderr


def test_no_kernel_spills_and_no_wgmma_is_serialised(log):
    assert complaints(log) == []


def test_all_kernels_are_in_the_report(log):
    kernels = [
        TILE.search(name).groups() for name in ENTRY.findall(log) if "SparseMatmulKernel" in name
    ]
    tiles = re.findall(
        r'F\("[^"]+", (\d+), (\d+), (\d+), \d+, \d+, \d+, (\w+),',
        (ROOT / "cuda/hopper/tile.h").read_text(),
    )
    assert tiles
    assert sorted(kernels) == sorted(
        (fp8, *tile, str(FORMS.index(form))) for *tile, form in tiles for fp8 in "01"
    )


def test_complaints_are_found():
    report = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ... in the function 'a'
ptxas info    : Compiling entry function 'a' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
    serialised, spills = complaints(report)
    assert "C7510" in serialised and spills.startswith("b: 8 bytes")


# --- machine code, where there is a disassembler --------------------------------------------------


def disassembler():
    beside = str(Path(nvcc()).resolve().parent) if nvcc() else None
    return (
        shutil.which("cuobjdump")
        or shutil.which("cuobjdump", path=beside)
        or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    )


WAITS = re.compile(r"\b(MEMBAR|CCTL|LDL|STL)\b")  # instructions that wait for memory


def registers(operands):
    return {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}


def main_loop(addresses, instructions):
    """The shortest loop with a wgmma, as indices of its first and last instruction.

    Others are the loop over tiles around it, and the ways back from waits that stand elsewhere.
    """
    loops = []
    for last, text in enumerate(instructions):
        if branch := re.search(r"\bBRA 0x([0-9a-f]+)", text):
            target = int(branch[1], 16)
            if target < addresses[last]:
                first = addresses.index(target)
                if any("GMMA" in text for text in instructions[first:last]):
                    loops.append((first, last))
    return min(loops, key=lambda loop: loop[1] - loop[0])


def misuses(instructions, loop):
    """Instructions that touch accumulators or metadata of a wgmma that may still run, or that make
    the loop wait for memory."""
    found = []
    # Committed groups, and instructions that are not committed: (accumulators, metadata).
    running, issued = [], []
    for i, text in enumerate(instructions):
        if m := re.search(r"GMMA\S*?64x(\d+)x(?:64|32)\S* R(\d+), gdesc\[\w+\], \w+(.*)", text):
            first = int(m[2])
            issued.append((set(range(first, first + int(m[1]) // 2)), registers(m[3])))
            if "gsb0" in text:
                running, issued = [*running, issued], []
        elif m := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text):
            running = running[len(running) - int(m[1]) :] if int(m[1]) else []
        else:
            busy = [one for group in [*running, issued] for one in group]
            written = re.match(r"(?:@\S+ )?\S+ R(\d+)", text)
            if any(registers(text) & accumulators for accumulators, _ in busy):
                found.append(f"accumulators in use: {text}")
            elif written and any(int(written[1]) in metadata for _, metadata in busy):
                found.append(f"metadata in use: {text}")
            elif loop[0] <= i <= loop[1] and WAITS.search(text):
                found.append(f"in the loop: {text}")
    return found


def test_nothing_disturbs_running_instructions():
    if disassembler() is None:
        pytest.skip("no cuobjdump")
    libraries = sorted(
        ROOT.glob("build/*/libslidejax_hopper.a"), key=lambda path: path.stat().st_mtime
    )
    if not libraries:
        pytest.skip("the library has not been built here")
    sass = subprocess.run(
        [disassembler(), "--dump-sass", libraries[-1]], capture_output=True, text=True, check=True
    ).stdout
    kernels = [
        part
        for part in sass.split("Function : ")[1:]
        if "SparseMatmulKernel" in part.split("\n", 1)[0]
    ]
    assert kernels
    for kernel in kernels:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;", kernel)
        addresses = [int(address, 16) for address, _ in found]
        instructions = [text for _, text in found]
        assert sum("GMMA" in text for text in instructions) >= 8
        loop = main_loop(addresses, instructions)
        assert misuses(instructions, loop) == [], kernel.split("\n", 1)[0]


def test_misuses_are_found():
    loop = ["IGMMA.SP.64x16x64.S8.S8 R24, gdesc[UR4], RZ, !UPT, R40, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R1, R2, R31",
            "LDS.64 R40, [R2]", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R1, R2, R31", "LDS.64 R40, [R2]", "MEMBAR.ALL.GPU",
            "IGMMA.SP.64x16x64.S8.S8 R24, gdesc[UR4], R24, R40, gsb0"]  # fmt: skip
    assert [text.split(":")[0] for text in misuses(loop, (0, 8))] == [
        "accumulators in use",
        "metadata in use",
        "in the loop",
    ]


def test_the_main_loop_is_found():
    """The loop over the steps of a tile, not the one over tiles around it."""
    loop = [
        "IGMMA.SP.64x16x64.S8.S8 R24, gdesc[UR4], R24, R40, gsb0",
        "@P0 BRA 0x20",
        "MEMBAR.ALL.GPU",
        "@P1 BRA 0x10",
    ]
    instructions = ["IADD R1, R2, R3", "IADD R1, R2, R3", *loop, "@P2 BRA 0x0"]
    addresses = [0x10 * i for i in range(len(instructions))]
    assert main_loop(addresses, instructions) == (2, 3)
