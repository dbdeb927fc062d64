"""`fastvit data label`: shards with the labels that a model gives their images."""

import argparse

from fastvit_engine.commands.data.make import part_of
from fastvit_engine.commands.data.options import wrapped
from fastvit_engine.commands.model import MODEL_HELP, add_model_options, load
from fastvit_engine.commands.parser import output_path_or_url, path_or_url, positive
from fastvit_engine.commands.settings import load_settings
from fastvit_engine.errors import UserError

_TOP = 47  # MOST_IN_A_BLOCK, whose module loads NumPy


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    label = actions.add_parser(
        "label",
        help="label the images of shards with a model, for a student to learn from",
        description=wrapped(
            "Write the samples of shards again with a teacher's labels: the most probable class in cls, and the "
            "probabilities of the most probable ones in soft.npy. Images keep their bytes. Labels that the shards have "
            "are not read. A run that was stopped resumes; running it again when it is done does nothing."
        ),
        epilog="examples:\n  fastvit data label runs/teacher --data data/more --out data/more-labelled\n"
        "  fastvit data label runs/teacher --ema --data s3://bucket/web --out s3://bucket/labelled --threshold 0.3\n"
        "  fastvit data label b16.safetensors --data data/i1k --out data/i1k-b16 --top 1000 --precision bf16\n\n"
        "on several GPUs or machines, a process for each, here the first of eight (CUDA_VISIBLE_DEVICES=0):\n"
        "  fastvit data label MODEL --data SHARDS --out DIR --part 1/8",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    label.add_argument("model", metavar="MODEL", type=path_or_url, help=MODEL_HELP)
    label.add_argument("--data", metavar="SHARDS", required=True, help="a folder (its training shards), a shard, a "
                       "glob or a URL")  # fmt: skip
    label.add_argument("--out", type=output_path_or_url, required=True, metavar="DIR", help="new folder for the "
                       "shards, here or in an object store")  # fmt: skip
    label.add_argument("--hard", action="store_true", help="write the class alone, without probabilities")
    label.add_argument("--top", metavar="K", type=positive, default=_TOP, help="classes with a probability of their "
                       "own; the others share the rest evenly (default: %(default)s, which fill 512 bytes)"
                       )  # fmt: skip
    label.add_argument("--threshold", metavar="P", type=float, help="leave out images whose most probable class has a "
                       "smaller probability")  # fmt: skip
    label.add_argument("--ignore-names", action="store_true", help="label the images although the classes of model and "
                       "data have different names")  # fmt: skip
    label.add_argument("--max-failed", type=float, default=0.0, metavar="SHARE", help="fraction of images that may be "
                       "unreadable or missing; failed.jsonl names them (default 0: none)")  # fmt: skip
    label.add_argument("--workers", type=positive, metavar="N", help="threads that decode (default: one per core)")
    label.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="write every N-th shard, from the "
                       "I-th")  # fmt: skip
    add_model_options(label)
    label.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    resolved = load_settings(args)

    from functools import partial

    from fastvit_engine.data.build.label import Teacher, label_shards
    from fastvit_engine.data.shards.names import info_beside, list_shards
    from fastvit_engine.evaluate.class_lists import check_names
    from fastvit_engine.evaluate.one_pass import config_for
    from fastvit_engine.evaluate.predict import most_probable
    from fastvit_engine.models.weights.fingerprint import fingerprint

    model = load(args.model, args)
    outputs = model.config.num_classes
    if outputs < 2:
        raise UserError(f"{args.model} has {outputs or 'no'} class: name a model that tells classes apart")
    info = info_beside(list_shards([args.data], "train", named="--data"))
    of_data = info.classes if info is not None and len(info.classes) > 1 else None  # one class says nothing
    if not args.ignore_names:
        check_names(model.class_names, of_data, "the teacher's take their place if you add --ignore-names")
    names = model.class_names or (of_data if of_data is not None and len(of_data) == outputs else None)
    teacher = Teacher(
        name=args.model,
        weights=fingerprint(model),
        class_names=list(names or map(str, range(outputs))),
        classify=partial(most_probable, model),
    )
    label_shards(
        args.data,
        args.out,
        teacher,
        config_for(model, resolved),
        hard=args.hard,
        top=args.top,
        threshold=args.threshold,
        max_failed=args.max_failed,
        batch_size=args.batch_size,
        workers=args.workers,
        part=args.part,
    )
    return 0
