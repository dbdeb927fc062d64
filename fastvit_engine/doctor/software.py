"""Checks that Python, PyTorch, Triton, DeepSpeed and the other packages are there and fit together."""

import importlib
import importlib.metadata
import platform
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fastvit_engine
from fastvit_engine.doctor.findings import Finding, Group
from fastvit_engine.nvidia_apex import EXTENSIONS, FROM_SOURCE, installed_apex, obstacle

_group = Group("software")
_INSTALL = "pip install 'fastvit-engine[train]', from the root of a checkout: pip install ./kernels '.[train]'"
_NEEDED = ("torch", "triton", "deepspeed", "pydantic")  # if the engine's own list is not there: it is not installed
_SAME_MODULE = {"opencv-python-headless": "cv2"}  # modules that other distributions bring as well
_SHOWN = ("torch", "triton", "deepspeed")  # that have a line of their own
_SLOW_IMPORT = 20.0  # seconds, without those for which a busy machine had no core for it


def check_software() -> Iterator[Finding]:
    python = platform.python_version()
    yield _group.ok("Python", python, same=python.rpartition(".")[0])
    yield _group.ok("engine", f"fastvit-engine {fastvit_engine.__version__}", same=fastvit_engine.__version__)
    yield from _check_packages()
    if _version("torch") is not None:
        yield from _check_triton()
        yield from _check_parts_of_torch()
        yield from _import_torch()
        yield from _check_torchvision()
    yield _check_apex()


def _check_packages() -> Iterator[Finding]:
    """Those that training needs, by the engine's own requirements."""
    wanted = _requirements("fastvit-engine", "train") + _requirements("fastvit-kernels")
    names = {_key(one.name): str(one.specifier) for one in wanted} or dict.fromkeys(_NEEDED, "")
    names.pop("fastvit-kernels", None)
    fine = 0
    for name, specifier in {**dict.fromkeys(_SHOWN, ""), **names}.items():
        version = _version(name)
        if version is None and name in _SAME_MODULE and importlib.util.find_spec(_SAME_MODULE[name]):
            fine += 1
        elif version is None:
            yield _group.problem(name, f"{name} is not installed, and training needs it", _INSTALL)
        elif not _satisfies(version, specifier):
            found = f"{name} {version} is installed, and the engine needs {specifier}"
            yield _group.problem(name, found, f"pip install '{name}{specifier}'", same=version)
        elif name in _SHOWN:
            yield _group.ok(name, version, same=version)
        else:
            fine += 1
    yield _group.ok("other packages", f"{fine} of {len(names.keys() - set(_SHOWN))} that training needs")


def _check_triton() -> Iterator[Finding]:
    """The Triton that this build of PyTorch was made with."""
    pinned = next((one for one in _requirements("torch") if _key(one.name) == "triton"), None)
    version, torch = _version("triton"), _version("torch")
    if version is None:
        return
    if pinned is None:
        yield _group.ok("torch and triton", f"this build of torch names no Triton; {version} is installed")
    elif _satisfies(version, str(pinned.specifier)):
        yield _group.ok("torch and triton", f"triton {version} is the one that torch {torch} was built with")
    else:
        yield _group.problem(
            "torch and triton",
            f"torch {torch} was built with triton{pinned.specifier}, and triton {version} is installed: kernels may "
            "not compile, or compute wrong numbers",
            f"pip install 'triton{pinned.specifier}'",
        )


def _check_parts_of_torch() -> Iterator[Finding]:
    """CUDA, cuDNN, NCCL: packages that PyTorch names with their exact versions."""
    pins = [one for one in _requirements("torch") if _key(one.name).startswith(("nvidia-", "cuda-"))]
    if not pins:
        return
    wrong = []
    for one in pins:
        version = _version(one.name)
        if version is None or not _satisfies(version, str(one.specifier)):
            wrong.append(f"{one.name} is {version or 'not installed'}, not {one.specifier}")
    if wrong:
        torch = _version("torch")
        found = f"of the packages that torch {torch} was built with, {'; '.join(wrong)}"
        advice = f"pip install --force-reinstall torch=={torch}"
        yield _group.warning("CUDA libraries", found, advice)
    else:
        yield _group.ok("CUDA libraries", f"{len(pins)} packages as torch was built with")


def _import_torch() -> Iterator[Finding]:
    began, waited = time.monotonic(), _waited_for_a_core()
    try:
        import torch
    except Exception as error:  # of a library that the loader does not find, most often
        yield _group.problem(
            "import torch", f"torch is installed and does not import: {_first_line(error)}", "install torch again"
        )
        return
    seconds, waited = time.monotonic() - began, _waited_for_a_core() - waited
    built = "without CUDA"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    elif torch.version.cuda:
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
        built = f"CUDA {torch.version.cuda}, " + ("NCCL " + ".".join(map(str, nccl)) if nccl else "without NCCL")
    found = f"built {'for ' if not built.startswith('without') else ''}{built}; imported in {seconds:.1f} s"
    if waited > seconds / 4:
        found += f", {waited:.1f} of which it waited for a core"
    if seconds - waited > _SLOW_IMPORT:
        advice = "keep the environment on a local disk: many ranks that import at once take longer still"
        yield _group.warning("import torch", found, advice, same=built, figures={"seconds": seconds})
    else:
        yield _group.ok("import torch", found, same=built, figures={"seconds": seconds})


def _waited_for_a_core() -> float:
    """Seconds for which this thread was ready to run and had no core; 0 if the kernel does not count them."""
    with suppress(OSError):
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _check_torchvision() -> Iterator[Finding]:
    """The engine does without it; timm and open_clip need it, and it must be of the same build as torch."""
    version, torch = _version("torchvision"), _version("torch")
    if version is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        yield _group.warning(
            "torchvision",
            f"torchvision {_build(version)} does not import with torch {torch}, nor then does timm: "
            + _first_line(error),
            _torchvision_of_the_build_of(str(torch)),
        )
    else:
        yield _group.ok("torchvision", version)


def _build(version: str) -> str:
    """With what torchvision was built for, as in 0.28.0+cu130: its packages need not say so in their names."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec and spec.submodule_search_locations) or ():
        with suppress(OSError):
            text = Path(folder, "version.py").read_text(errors="replace")
            if match := re.search(r"^__version__ = ['\"]([\w.+]+)['\"]", text, re.MULTILINE):
                return match[1]
    return version


def _torchvision_of_the_build_of(torch: str) -> str:
    """What to do: `pip install torchvision` alone brings no other build for a torch such as 2.13.0+cpu."""
    release, _, build = torch.partition("+")
    if not build:
        return f"pip uninstall -y torchvision, and pip install torchvision torch=={torch}"
    if not re.fullmatch(r"cpu|xpu|cu\d+|rocm[\d.]+", build):
        return (
            "this torch was not built by PyTorch: take torchvision from where torch came from, or build it; or pip "
            "uninstall torchvision, if you need neither timm nor open_clip"
        )
    keep = (
        f"pip uninstall -y torchvision, and pip install torchvision torch=={torch} --index-url URL, with the URL that "
        f"https://pytorch.org/get-started/locally shows for {build}"
    )
    if not re.fullmatch(r"cpu|cu\d+", build) or not re.fullmatch(r"[\d.]+", release):
        return keep  # the package index has no such torch
    return (
        f"{keep}; or, for a torch with CUDA, pip uninstall -y torch torchvision, and "
        f"pip install torch==={release} torchvision"
    )


def _check_apex() -> Finding:
    try:
        kind, folders = installed_apex()
    except (ImportError, ValueError) as error:
        found = f"something of the name apex is installed that cannot be looked into: {error}"
        return _group.warning("apex", found, "pip uninstall apex: nothing here needs it")
    if kind == "none":
        return _group.ok("apex", "not installed; optimizer.kernels = apex and the benchmarks would use it")
    where = folders[0] if folders else "an unknown place"
    if kind == "other":
        return _group.warning(
            "apex",
            f"the apex in {where} is not NVIDIA's but a toolkit for a web framework of the same name: other "
            "libraries may take it for NVIDIA's and fail",
            f"pip uninstall apex; to have NVIDIA's, {FROM_SOURCE}",
        )
    can = sorted({name for module, name in EXTENSIONS.items() if obstacle(module) is None})
    return _group.ok("apex", f"NVIDIA's, with {', '.join(can)}" if can else "NVIDIA's, without compiled extensions")


def _requirements(distribution: str, extra: str = "") -> list[Any]:
    """Of an installed distribution, in this environment; none if it, or the parser, is not installed."""
    try:
        from packaging.requirements import Requirement

        parsed = [Requirement(text) for text in importlib.metadata.requires(distribution) or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]


def _satisfies(version: str, specifier: str) -> bool:
    """By its release: 2.11.0a0+nv25.11 and 2.11.0+cpu count as 2.11.0."""
    if not specifier:
        return True
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(specifier).contains(Version(version).base_version, prereleases=True)
    except InvalidVersion:
        return True


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
