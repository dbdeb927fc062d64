"""`fastvit robustness`: accuracy with parts of the images missing, exchanged, or made to deceive the model."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvit_engine.commands.model import MODEL_HELP, add_model_options, check_output_folder, load
from fastvit_engine.commands.parser import local_path, path_or_url, positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say

if TYPE_CHECKING:
    from pathlib import Path

    from fastvit_engine.config import Config, Resolved
    from fastvit_engine.evaluate.robustness import Pixels, Usable
    from fastvit_engine.models import AnyModel

_TESTS = ("occlusion", "shuffle", "patch")
_PATCH_IMAGES = 256


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "robustness",
        help=purpose,
        description="Measures the top-1 accuracy that is left\n"
        "  occlusion  with 10 to 90 % of the image in the mean colour: random cells of a 14 x 14 grid, or first\n"
        "             those that the model's answer depends on most (by its gradient)\n"
        "  shuffle    with the image cut into 2 x 2 to 14 x 14 tiles that change places\n"
        "  patch      with a small square at a random place, which was optimised against the model on the first\n"
        "             images and is measured on all others; and with a plain square there\n"
        "What is random about an image follows from --seed and its place in the shards.",
        epilog="examples:\n  fastvit robustness runs/b16 --data data/imagenet\n"
        "  fastvit robustness runs/b16 runs/r50x1 --data data/imagenet --stylised data/stylised --out robustness",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", type=path_or_url, help=MODEL_HELP)
    parser.add_argument("--data", metavar="SHARDS", required=True, help="a folder (its evaluation shards), a shard, a "
                        "glob or a URL")  # fmt: skip
    parser.add_argument("--tests", nargs="+", choices=_TESTS, default=_TESTS, help="default: all three")
    parser.add_argument("--stylised", metavar="SHARDS", help="the same classes in another texture, such as "
                        "Stylized-ImageNet: also measure the accuracy on these")  # fmt: skip
    parser.add_argument("--patch-images", metavar="N", type=positive, help="the first images, on which patches are "
                        f"optimised (default: {_PATCH_IMAGES}, or a quarter of them)")  # fmt: skip
    parser.add_argument("--patch-steps", metavar="N", type=positive, default=250, help="of the optimisation of each "
                        "patch, a batch each (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N samples")
    parser.add_argument("--out", metavar="DIR", type=local_path, help="also draw robustness.png (and .svg, and for "
                        "dark pages), one picture of all models, and write robustness.json")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_output_folder(args.out)
    from fastvit_engine.commands.settings import load_settings
    from fastvit_engine.observe.optional import require

    if args.out is not None:
        require("fastvit robustness --out", "figures", "matplotlib")
    resolved = load_settings(args)
    found = [{"model": source, **_Measurement.of(source, resolved, args).figures()} for source in args.models]
    if args.out is not None:
        _write(found, args.out)
    if args.json:
        one = {name: value for name, value in found[0].items() if name != "model"}
        print(json.dumps(one if len(found) == 1 else {"models": found}))
    else:
        for figures in found:
            say("\n".join(_lines(figures)))
    return 0


class _Measurement(NamedTuple):
    """Of one model."""

    model: "AnyModel"
    pixels: "Pixels"
    config: "Config"  # of how images are read for it
    args: argparse.Namespace

    @classmethod
    def of(cls, source: str, resolved: "Resolved", args: argparse.Namespace) -> "_Measurement":
        from fastvit_engine.config.packing import check_squares
        from fastvit_engine.evaluate.one_pass import config_for
        from fastvit_engine.evaluate.robustness import Pixels
        from fastvit_kernels import FusedPatchEmbed, dispatch

        check_squares(resolved.config)
        model = load(source, args).requires_grad_(False)
        if model.config.num_classes < 1:
            raise UserError(f"{source} has no head, so it names no class: fine-tune it first")
        by_gradient = {"occlusion", "patch"}.intersection(args.tests)
        embeds = any(isinstance(module, FusedPatchEmbed) for module in model.modules())
        if by_gradient and embeds and dispatch.asked_for("patch_embed") == "triton":
            raise UserError(
                f"--tests {' '.join(sorted(by_gradient))} need the gradient of images, which the kernel of patch_embed "
                "does not compute: set FASTVIT_KERNELS=triton,patch_embed=auto"
            )
        pixels = Pixels.of(model.pixel_mean, model.pixel_std, next(model.parameters()).device)
        return cls(model, pixels, config_for(model, resolved), args)

    def figures(self) -> dict[str, Any]:
        """As --json gives them."""
        from fastvit_engine.evaluate.robustness import RATIOS, TILES, WHOLE, accuracies, occluded, shuffled

        tests = {"occlusion": occluded(self.model), "shuffle": shuffled}
        changes = [change for test, change in tests.items() if test in self.args.tests]
        top1, samples = accuracies(self.model, self._images(), changes, self.args.seed)
        whole = top1[WHOLE]
        figures: dict[str, Any] = {"samples": samples, "top1": whole}
        if "occlusion" in self.args.tests:
            figures["occlusion"] = [{"ratio": 0.0, "top1": whole, "top1_salient": whole}] + [
                {"ratio": ratio, "top1": top1["random", ratio], "top1_salient": top1["salient", ratio]}
                for ratio in RATIOS
            ]
        if "shuffle" in self.args.tests:
            measured = [{"tiles": tiles, "top1": top1[tiles]} for tiles in TILES if tiles in top1]
            figures["shuffle"] = [{"tiles": 1, "top1": whole}, *measured]
        if "patch" in self.args.tests:
            figures["patch"] = self._patches(samples)
        if self.args.stylised is not None:
            top1, samples = accuracies(self.model, self._images(self.args.stylised, "--stylised"), ())
            figures["stylise"] = {"samples": samples, "top1": top1[WHOLE]}
        return figures

    def _patches(self, samples: int) -> list[dict[str, Any]]:
        """The accuracy by the side of the patch, on images that no patch was optimised on."""
        from fastvit_engine.evaluate.robustness import (
            WHOLE,
            accuracies,
            deceptive_patch,
            in_order,
            sides_for,
            with_patches,
        )
        from fastvit_engine.observe.progress import WorkProgress

        args, sides = self.args, sides_for(self.model.config.image_size)
        count = args.patch_images or min(_PATCH_IMAGES, samples // 4)
        if not 0 < count < samples:
            raise UserError(
                f"patches need images to be optimised on and others to be measured on, and there are {samples}: choose "
                "fewer with --patch-images, or leave patch out of --tests"
            )
        first = in_order(self._images(below=count), args.batch_size)
        progress, patches = WorkProgress(), []
        progress.start("optimising", len(sides), "patches")
        for side in sides:
            patches.append(
                deceptive_patch(self.model, first, self.pixels, side, steps=args.patch_steps, seed=args.seed)
            )
            progress.update(len(patches))
        progress.clear()
        top1, _ = accuracies(self.model, self._images(since=count), [with_patches(patches)], args.seed)
        return [{"size": 0, "top1": top1[WHOLE], "top1_plain": top1[WHOLE]}] + [
            {"size": side, "top1": top1["optimised", side], "top1_plain": top1["plain", side]} for side in sides
        ]

    def _images(
        self, pattern: str | None = None, named: str = "--data", *, since: int = 0, below: int | None = None
    ) -> Iterator["Usable"]:
        """The images of a pass, at positions from `since` on and below `below`."""
        from fastvit_engine.evaluate.class_lists import check_names
        from fastvit_engine.evaluate.one_pass import OnePass
        from fastvit_engine.evaluate.robustness import usable_images
        from fastvit_engine.observe.progress import WorkProgress

        limit = self.args.limit if below is None else below
        shards = OnePass.over(pattern or self.args.data, "eval", self.config, named=named, limit=limit)
        advice = "give images of the model's classes, named as it names them"
        check_names(self.model.class_names, None if shards.info is None else shards.info.classes, advice)
        batches = shards.batches(self.args.batch_size, doing="measuring", progress=WorkProgress())
        return usable_images(batches, self.pixels, self.model.config.num_classes, since)


def _write(found: Sequence[dict[str, Any]], out: "Path") -> None:
    from fastvit_engine.evaluate.robustness_figure import draw
    from fastvit_engine.files import atomic_write

    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / "robustness.json", json.dumps({"models": list(found)}, indent=1) + "\n")
        draw(found, out)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): choose another --out") from error
    say(f"{out}: robustness.png (and .svg, -dark.png, -dark.svg), robustness.json", file=sys.stderr)


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    """The figures of a model as tables of two or three rows, in %."""
    yield f"{figures['model']}: top-1 {100 * figures['top1']:.2f} %  ({figures['samples']:,} images)"
    if "occlusion" in figures:
        yield from _table("image dropped, %", [f"{100 * row['ratio']:.0f}" for row in figures["occlusion"]],
                          {"random cells": "top1", "salient first": "top1_salient"}, figures["occlusion"])  # fmt: skip
    if "shuffle" in figures:
        titles = [f"{row['tiles']}x{row['tiles']}" for row in figures["shuffle"]]
        yield from _table("tiles exchanged", titles, {"top-1": "top1"}, figures["shuffle"])
    if "patch" in figures:
        titles = [str(row["size"]) for row in figures["patch"]]
        rows = {"optimised": "top1", "plain": "top1_plain"}
        yield from _table("side of patch, px", titles, rows, figures["patch"])
    if "stylise" in figures:
        yield f"stylised: top-1 {100 * figures['stylise']['top1']:.2f} %  ({figures['stylise']['samples']:,} images)"


def _table(title: str, columns: Sequence[str], rows: dict[str, str], found: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"  {title:<18}" + "".join(f"{column:>6}" for column in columns)
    for name, key in rows.items():
        yield f"  {name:<18}" + "".join(f"{100 * row[key]:6.1f}" for row in found)
