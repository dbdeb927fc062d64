"""A pytest plugin: a run fails if a test is skipped for a reason that is not listed here.

`make test` loads it (`-p tests.skips`). So a package that is missing from the environment of the tests, or a condition
that nobody meant, cannot take tests away unseen.
"""

import re
from collections.abc import Iterator

import pytest

ALLOWED = {
    "a GPU": r"no GPU|pinned memory needs a GPU|too (slow|large) without a GPU",
    "an opt-in matrix": r"FASTVIT_TEST_[A-Z]+=all",
    "root, or not root": r"root may write anywhere|network namespaces need root|cannot mount a .* file system here",
    "the operating system": r"reads /proc|relies on Linux|no network namespaces here|has no route to anywhere",
    "a program that pip does not install": (
        r"no Prometheus$|^no (Chromium|zsh|hadolint)$|needs (ssh|ssh-keygen|sshd|pdsh|openssl to .*)$|need iproute2$|"
        r"\(slurm-wlm and munge\)$"
    ),
    "a tracker that the tests do not need": r"^(mlflow|trackio) is not installed$",
    "a peer of the benchmarks that the tests do not need": r"^(dali|spdl|quack|torchao) is not installed$",
    "real shards beside the checkout": r"no real shards at |no CIFAR-10 shards in \.\./shared/data",
    "weights of others, kept out of the repository, and what reads them": (
        r"^no .*: see tests/fastvit_engine/models/weights/dinov2_weights\.py$|^needs onnx(runtime)?: pip install"
    ),
    "a case that has no meaning for one implementation": r"^does not apply: ",
}


class Skips:
    """Collects the reasons that are not allowed, and fails the run if there are any."""

    def __init__(self) -> None:
        self.unknown: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            if not any(re.search(pattern, reason) for pattern in ALLOWED.values()):
                self.unknown.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if self.unknown and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        yield  # last of all sections, so that the end of a long log shows it
        if self.unknown:
            terminalreporter.section("skipped for a reason that tests/skips.py does not list", red=True)
            for line in self.unknown:
                terminalreporter.line(line)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # with pytest-xdist, the process that sees the reports of all workers
        config.pluginmanager.register(Skips(), "skips")
