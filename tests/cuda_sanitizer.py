"""The kernels of cuda/ under compute-sanitizer, without JAX (tests/cuda/sanitize).

    python tests/cuda_sanitizer.py                    # compiles them, and runs every tool
    python tests/cuda_sanitizer.py --binary FILE --seconds 160

prints a table of what each tool found, and the first report of each kind.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests/cuda/sanitize"
KERNELS = (
    "lift/lift.cu",
    "lift/fused.cu",
    "lift/geometry.cc",
    "hopper/launch.cu",
    "hopper/plan.cc",
    "decode/decode.cu",
    "attention/attention.cu",
    "cusparselt/helpers.cu",
    "cusparselt/pack.cu",
)
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# The names of kernels, and into how many processes their cases are divided.
PARTS = {"hopper": 4, "decode": 3, "lift": 3, "attention": 1, "cusparselt": 1}
SECONDS_OF_PROCESS = 60
# The accesses that racecheck reports in these functions are ordered in ways that it does not see:
# by a thread that arrives at a barrier for its warp or warp group, and in decode by words that
# warps pass to each other (docs/journal/2026-11-27-sanitizer.md). The functions are inlined;
# compiled with -lineinfo, a report names them and not their kernel.
ORDERED = {
    ("racecheck", "Contribute"),  # decode: the sums of a warp
    ("racecheck", "LoadShared4I"),  # hopper: the description of a work tile
    ("racecheck", "StoreShared4"),  # hopper: metadata that expanders write in place
}


def missing():
    """Why the kernels cannot be compiled or checked here, or None."""
    if nvcc() is None:
        return "needs nvcc"
    if tool() is None:
        return "needs compute-sanitizer"
    return None


def nvcc():
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def tool():
    path = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=path)


def build(folder, jobs=None):
    """Compiles the kernels, with the lines of their sources, and the cases; returns the program."""
    folder = Path(folder)
    sources = [ROOT / "cuda" / name for name in KERNELS]
    sources += sorted([*CASES.glob("*.cc"), *CASES.glob("*.cu")])
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    flags = ["-std=c++17", "-O3", "-lineinfo", architecture, "-DNDEBUG"]
    flags += [f"-I{ROOT / 'cuda'}", f"-I{CASES}"]

    def compiled(source):
        target = folder / f"{source.parent.name}_{source.name}.o"
        done = subprocess.run(
            [nvcc(), *flags, "-c", source, "-o", target], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{source} does not compile:\n{done.stderr[:3000]}")
        return target

    with concurrent.futures.ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = folder / "sanitize"
    subprocess.run([nvcc(), architecture, *objects, "-o", program], check=True)
    return program


@dataclasses.dataclass
class Report:
    """Reports of one kind: what was found, where, how often, and the first in full."""

    what: str
    where: str
    count: int
    text: str


def unexplained(done):
    """The reports of a run that are not known to be wrong."""
    found = reports(done.text)
    return [r for r in found if (done.tool, r.where.partition(" ")[0]) not in ORDERED]


_RULE = "========="
_NO_REPORT = ("COMPUTE-SANITIZER", "SUMMARY", "Target application", "No ", "Warning: ")
_PLACE = re.compile(r"\bat (?P<function>.+?)\+0x[0-9a-f]+(?: in (?P<line>\S+))?")
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")


def reports(text):
    """The kinds of reports in what compute-sanitizer printed, the most frequent first."""
    found, block = {}, []

    def close():
        if not block:
            return
        place = next(filter(None, map(_PLACE.search, block)), None)
        where = f"{kernel_name(place['function'])} {place['line'] or ''}".strip() if place else ""
        # A race is between two places; only the first line says which.
        what = _PLACE.sub("", block[0]).strip(" .")
        key = (_NUMBERS.sub("", what), where)
        if key in found:
            found[key].count += 1
        else:
            found[key] = Report(what, where, 1, "\n".join(block))
        block.clear()

    for line in text.splitlines():
        if not line.startswith(_RULE):
            continue
        said = line[len(_RULE) :]
        if said.startswith("     "):
            if block:
                block.append(said[5:])
            continue
        close()
        said = said.strip()
        if said and not any(word in said for word in _NO_REPORT):
            block.append(said)
    close()
    return sorted(found.values(), key=lambda report: -report.count)


def kernel_name(function):
    """A function's name without its types: `void a::Kernel<int, 4>(int *)` is `Kernel`."""
    depth, name = 0, ""
    for letter in function.replace("(anonymous namespace)", ""):
        if letter in "<(":
            depth += 1
        if depth == 0:
            name += letter
        if letter in ">)":
            depth -= 1
    return name.split("::")[-1].split()[-1] if name.split() else function


@dataclasses.dataclass
class Run:
    """One process: what it checked, what it printed, and how it ended."""

    tool: str
    kernels: str
    text: str
    ended: str  # "", or why the run is not whole
    seconds: float

    @property
    def results(self):
        """A number for the results of each case, or FAILED."""
        return dict(re.findall(r"^(\w.*): (\d+|FAILED).*$", self.text, re.MULTILINE))


def run(program, tool_name, kernels, which="all", part=0, parts=1, seconds=SECONDS_OF_PROCESS):
    """Runs the cases of some kernels under a tool, or with "none" as they are."""
    command = [program, kernels, which, str(part), str(parts)]
    if tool_name != "none":
        limits = ["--print-limit", "200", "--error-exitcode", "9", "--show-backtrace", "device"]
        command = [tool(), "--tool", tool_name, *limits, *_flags_of(tool_name), *command]
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        # A tool starts the program as a child, so that both are in a session that can be ended.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        output.seek(0)
        text = output.read()
    stopped = re.search(r"^stopped: .*|^.*FAILED.*", text, re.MULTILINE)
    if status is None:
        ended = "out of time"
    elif stopped:
        ended = stopped[0]
    else:
        ended = "" if status in (0, 9) else f"status {status}: {text[-300:]}"
    return Run(tool_name, kernels, text, ended, time.monotonic() - begun)


def _flags_of(tool_name):
    """memcheck puts room between arrays, and where it can it goes on after a bad access."""
    if tool_name != "memcheck":
        return []
    flags = ["--padding", "256", "--report-api-errors", "no"]
    if "--destroy-on-device-error" in _help():
        flags += ["--destroy-on-device-error", "kernel"]
    return flags


def _help():
    return subprocess.run([tool(), "--help"], capture_output=True, text=True, check=False).stdout


def run_all(program, seconds, jobs=12):
    """Every case as it is and under memcheck, a case of each kernel under the other tools.

    Kernels with planted faults come first. Yields each Run when it has ended; all end within
    `seconds`.
    """
    work = [(name, f"planted {name}", "all", 0, 1) for name in TOOLS]
    work += [("none", kernels, "all", 0, 1) for kernels in PARTS]
    for name in TOOLS:
        which = "all" if name == "memcheck" else "one"
        for kernels, parts in PARTS.items():
            work += [(name, kernels, which, part, parts) for part in range(parts)]
    end = time.monotonic() + seconds

    def one(item):
        limit = min(SECONDS_OF_PROCESS, end - time.monotonic())
        if limit < 1:
            return Run(item[0], item[1], "", "no time left", 0)
        return run(program, *item, seconds=limit)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, item) for item in work]):
            yield future.result()


def failed(done):
    """Whether a run is not whole, and should be."""
    return bool(done.ended) and is_ours(done)


def is_ours(done):
    """Whether a run is of the kernels of cuda/, and not of planted faults."""
    return not done.kernels.startswith("planted")


def different(runs):
    """The cases whose results a tool changes: they depend on time."""
    plain = {}
    for done in runs:
        if done.tool == "none":
            plain.update(done.results)
    return [
        f"{done.tool} {case}: {result} instead of {plain[case]}"
        for done in runs
        for case, result in done.results.items()
        if plain.get(case, result) != result
    ]


def summary(runs):
    """The lines of a table, and of the first report of each kind."""
    rows = collections.defaultdict(list)
    for done in runs:
        rows[done.tool, done.kernels].append(done)
    lines = [f"{'tool':10} {'kernels':20} {'cases':>5} {'reports':>7} {'seconds':>7}"]
    kinds, ends = {}, []
    for (name, kernels), group in sorted(rows.items()):
        found = [report for done in group for report in reports(done.text)]
        count = sum(report.count for report in found)
        slowest = max(done.seconds for done in group)
        cases = sum(len(done.results) for done in group)
        lines.append(f"{name:10} {kernels:20} {cases:5} {count:7} {slowest:7.1f}")
        # A tool may end a program with a planted fault.
        ends += [f"{name} {kernels}: {done.ended[:300]}" for done in group if failed(done)]
        for report in found:
            kind = kinds.setdefault((name, _NUMBERS.sub("", report.what), report.where), report)
            if kind is not report:
                kind.count += report.count
    lines += ["", "not whole:", *ends] if ends else []
    if other := different(runs):
        lines += ["", f"{len(other)} cases have other results under a tool:", *other[:20]]
    for (name, _, where), report in kinds.items():
        known = ", known to be ordered" if (name, where.partition(" ")[0]) in ORDERED else ""
        lines += ["", f"{name}, {report.count} times{known}: {report.what} | {where}"]
        lines += [f"    {line[:200]}" for line in report.text.splitlines()[:8]]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, help="the program, if it is compiled already")
    parser.add_argument("--seconds", type=float, default=600, help="for all tools together")
    parser.add_argument("--logs", type=Path, help="a file for all that the tools print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for done in run_all(args.binary or build(folder), args.seconds):
            runs.append(done)
            if args.logs:
                with open(args.logs, "a") as logs:
                    logs.write(f"#### {done.tool} {done.kernels} {done.ended}\n{done.text}\n")
    print("\n".join(summary(runs)))
    return any(failed(done) or unexplained(done) for done in runs if is_ours(done))


if __name__ == "__main__":
    sys.exit(main())
