"""`fastvit predict`: what a model says of images."""

import argparse
import json
import sys
from typing import Any

from fastvit_engine.commands.model import MODEL_HELP, add_model_options, check_output, load
from fastvit_engine.commands.parser import local_path, local_text, path_or_url, positive
from fastvit_engine.errors import UserError
from fastvit_engine.shown import say, shown


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", purpose: str) -> None:
    parser = commands.add_parser(
        "predict",
        help=purpose,
        description="Prints the most probable classes of images, with the probabilities of a softmax over all.\n"
        "Images are resized and cropped as in the model's run. One that cannot be decoded is named on stderr; the\n"
        "exit code is 2 if none can be.",
        epilog="examples:\n  fastvit predict runs/photos cat.jpg dog.jpg\n"
        "  fastvit predict photos.safetensors holiday/ --top 1 --json\n"
        "  fastvit predict runs/photos holiday/ --out sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=path_or_url, help=MODEL_HELP)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=local_text, help="an image, or a folder of images")
    parser.add_argument("--top", metavar="K", type=positive, default=5, help="classes per image (default: 5)")
    parser.add_argument("--out", metavar="SHEET.png", type=local_path, help="also draw the images with their classes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.out is not None:
        check_output(args.out, "--out", (args.model, *args.images))
    from fastvit_engine.commands.settings import load_settings

    resolved = load_settings(args)

    from fastvit_engine.data.check.contact_sheet import save_sheet
    from fastvit_engine.evaluate.confusion import name_of
    from fastvit_engine.evaluate.one_pass import config_for
    from fastvit_engine.evaluate.predict import Unreadable, find_images, predict, prediction_sheet
    from fastvit_engine.observe.progress import WorkProgress

    paths = find_images(args.images)
    if args.out is not None:
        check_output(args.out, "--out", paths)
    model = load(args.model, args)
    if model.config.num_classes < 1:
        raise UserError(f"{args.model} has no head, so it names no class: use `fastvit fewshot` on its features")
    config, names = config_for(model, resolved), model.class_names
    progress = WorkProgress()
    progress.start("predicting", len(paths), "images")
    found, failed = [], []
    for number, one in enumerate(predict(model, paths, config, top=args.top, batch_size=args.batch_size), start=1):
        progress.update(number)
        if isinstance(one, Unreadable):
            progress.clear()
            say(f"fastvit: {shown(one.path)} cannot be used: {one.reason}", file=sys.stderr)
            failed.append(one)
            continue
        found.append(one)
        if not args.json:
            best = zip(one.outputs, one.probabilities, strict=True)
            progress.clear()
            say(f"{one.path}: " + ", ".join(f"{name_of(output, names)} {100 * p:.1f} %" for output, p in best))
    progress.clear()
    if not found:
        raise UserError(f"none of {len(paths):,} files is an image that can be used: name others")
    if args.json:
        images: list[dict[str, Any]] = []
        for one in found:
            classes = [
                {"class": output, "name": None if names is None else name_of(output, names), "probability": probability}
                for output, probability in zip(one.outputs, one.probabilities, strict=True)
            ]
            images.append({"image": one.path, "classes": classes})
        print(json.dumps({"images": images, "failed": [one._asdict() for one in failed]}))
    if args.out is not None:
        save_sheet(prediction_sheet(found, config, names), args.out, option="--out")
        say(f"{args.out}: {min(len(found), 200):,} images", file=sys.stderr)
    return 0
