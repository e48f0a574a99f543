"""Run transformers' and PEFT's own tests on converted models and compare with the native result, test by test.

    python tests/conformance/run.py --checkout ~/transformers --families llama gpt2 --kinds identity linear
    python tests/conformance/run.py --suite peft

`--checkout` is a clone of transformers' repository, at the tag of the installed version or the nearest there is; its
tests are overlaid with those that the installed version's source distribution ships. See README.md here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sources
import tiny_hub
from compare import Comparison, Outcomes, compare, failed_without_attentions, load_reasons
from conformance_plugin import KINDS
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
FAMILIES = (
    "llama gpt2 mistral qwen2 qwen3 gemma gpt_neox olmo2 phi phi3 stablelm starcoder2 opt granite glm cohere".split()
)
PEFT_TESTS = "(Llama or GPT2) and (LoraConfig or IA3Config or PrefixTuningConfig or PromptTuningConfig)"
NEEDED = ("parameterized", "pytest_timeout", "httpx", "timeout_decorator")


@dataclass(frozen=True)
class Suite:
    """Tests of one family, or PEFT's.

    Args:
        name: For tables and files.
        folder: Where pytest runs.
        tests: Path of the test file in it.
        families: Model types that are converted.
        select: Expression for pytest's `-k`, or "".
    """

    name: str
    folder: Path
    tests: str
    families: str
    select: str = ""


class Runner:
    """Runs suites in processes of their own.

    Args:
        options: What the command line says.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.outcomes = options.workdir / "outcomes"
        self.outcomes.mkdir(parents=True, exist_ok=True)

    def run(self, suite: Suite, kind: str, tests: list[str] | None = None) -> Outcomes:
        """Return the outcome of each test; of some `tests` only, then without asking for attention weights."""
        o = self.options
        label = "-".join(filter(None, [suite.name, kind, o.plant, str(o.init_std or ""), "second" if tests else ""]))
        file = self.outcomes / f"{label}.json"
        if o.reuse and file.exists():
            earlier = Outcomes.load(file)
            if earlier.tests and earlier.tests.keys() >= {*(tests or [])}:
                return earlier
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "conformance_plugin", "-q", "-W", "ignore"]
        command += ["--timeout", "300", "--kind", kind, "--families", suite.families, "--outcomes", str(file)]
        command += ["--init-std", str(o.init_std)] if o.init_std else []
        command += ["--plant", o.plant] if o.plant and kind != "native" else []
        command += ["--without-attentions", *tests] if tests else [suite.tests]
        command += ["-k", suite.select] if suite.select and not tests else []
        done = subprocess.run(command, cwd=suite.folder, env=self._environment(), capture_output=True, text=True)
        if not file.exists() or not Outcomes.load(file).tests:
            raise SystemExit(f"{' '.join(command)} failed in {suite.folder}:\n{(done.stdout + done.stderr)[-4000:]}")
        return Outcomes.load(file)

    def compare(self, suite: Suite, kind: str, native: Outcomes) -> Comparison:
        """Run one kind and compare."""
        converted = self.run(suite, kind)
        reasons = load_reasons(HERE / "reasons.toml")
        found = compare(suite.name, kind, native, converted, reasons)
        again = failed_without_attentions(found)
        if again:
            second = self.run(suite, kind, again)
            for test in again:
                if second.outcome(test) != "passed":
                    found.unexplained[test] = "also without attention weights: " + second.message(test)
                    found.known.pop(test)
        return found

    def _environment(self) -> dict[str, str]:
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(self.options.workdir / "hub"),
        }


def suites(options: argparse.Namespace) -> list[Suite]:
    """Return what is to run, and fetch or unpack the tests."""
    found = []
    if "transformers" in options.suite:
        if options.checkout is None:
            raise SystemExit("transformers' tests need --checkout, a clone of its repository (see README.md here)")
        folder = sources.transformers_tests(options.checkout.expanduser(), options.workdir)
        for family in options.families:
            tests = f"tests/models/{family}/test_modeling_{family}.py"
            if not (folder / tests).exists():
                raise SystemExit(f"the checkout has no {tests}; families are named as the folders in tests/models")
            found.append(Suite(family, folder, tests, family, options.select))
    if "peft" in options.suite:
        tiny_hub.build(options.workdir / "hub")
        families = ",".join(sorted({model_type for model_type, _ in tiny_hub.MODELS.values()}))
        folder = sources.peft_tests(options.workdir)
        select = options.select or PEFT_TESTS
        found.append(Suite("peft", folder, "tests/test_decoder_models.py", families, select))
    return found


def show(console: Console, comparisons: list[Comparison]) -> None:
    """Print one row a comparison, and every failure that has no reason."""
    table = Table("suite", "kind", "passes natively", "passes converted", "known", "unexplained", "models converted")
    for found in comparisons:
        counts = (found.native, found.passed, len(found.known), len(found.unexplained), found.conversions)
        table.add_row(found.suite, found.kind, *map(str, counts))
    console.print(table)
    for found in comparisons:
        for test, message in found.unexplained.items():
            console.print(f"{found.suite} {found.kind}: {test}\n    {message}", markup=False, highlight=False)


def write(file: Path, comparisons: list[Comparison]) -> None:
    """Write the comparison as JSON to `file`, and its counts as a Markdown table beside it."""
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")}
    report = {**versions, "runs": [found.as_dict() for found in comparisons]}
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    lines = [", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    lines += [
        "| suite | kind | passes natively | passes converted | known | unexplained |",
        "|---|---|---|---|---|---|",
    ]
    for found in comparisons:
        counts = (found.native, found.passed, len(found.known), len(found.unexplained))
        lines.append(f"| {found.suite} | {found.kind} | {' | '.join(map(str, counts))} |")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=["transformers", "peft"], default=["transformers"])
    parser.add_argument("--checkout", type=Path, help="a clone of transformers' repository")
    parser.add_argument("--families", nargs="+", default=FAMILIES, metavar="TYPE")
    parser.add_argument("--kinds", nargs="+", choices=[k for k in KINDS if k != "native"], metavar="KIND")
    parser.add_argument("--select", "-k", default="", help="expression that selects tests, as for pytest -k")
    parser.add_argument("--init-std", type=float, help="standard deviation of initial weights in place of 0.02")
    parser.add_argument("--plant", help="a deliberate bug in the converted runs (see plants.py)")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--reuse", action="store_true", help="take outcomes of an earlier run where there are any")
    parser.add_argument("--workdir", type=Path, default=Path("~/.cache/hf_effattn/conformance"))
    parser.add_argument(
        "--results", type=Path, help="file for the comparison, as JSON; a table as Markdown goes beside it"
    )
    options = parser.parse_args()
    options.workdir = options.workdir.expanduser().resolve()
    options.kinds = options.kinds or [kind for kind in KINDS if kind != "native"]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"these tests also need: pip install {' '.join(missing).replace('_', '-')}")
    return options


def main() -> None:
    options = arguments()
    options.workdir.mkdir(parents=True, exist_ok=True)
    console, runner = Console(), Runner(options)

    def one(suite: Suite) -> list[Comparison]:
        native = runner.run(suite, "native")
        return [runner.compare(suite, kind, native) for kind in options.kinds]

    with ThreadPoolExecutor(options.jobs) as pool:
        comparisons = [found for of_suite in pool.map(one, suites(options)) for found in of_suite]
    show(console, comparisons)
    if options.results:
        write(options.results, comparisons)
    sys.exit(any(found.unexplained for found in comparisons))


if __name__ == "__main__":
    main()
